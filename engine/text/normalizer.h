/// Unicode normalization form C.
#pragma once

#include <string>
#include <string_view>

namespace compact::engine {

/// The NFC form of `text`, which must be well-formed UTF-8. By Unicode 9, as in the `tokenizers` package: characters
/// that came later are left as they are.
///
/// Takes n log n time whatever the text: a run of combining marks is sorted, not bubbled.
[[nodiscard]] std::string to_nfc(std::string_view text);

/// True if `text` holds only characters below U+0300, which NFC never changes: a quick test that may say false too
/// often.
[[nodiscard]] bool is_trivially_nfc(std::string_view text) noexcept;

}  // namespace compact::engine
