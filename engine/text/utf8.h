/// UTF-8 as bytes arrive: what is well formed, what is cut, what is broken.
///
/// Well formed is Unicode's definition (table 3-7): no overlong forms, no surrogates, nothing above U+10FFFF.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace compact::engine {

/// Length in bytes (1 to 4) of the well-formed sequence that starts `bytes`, or 0 if none does.
[[nodiscard]] int32_t utf8_sequence_bytes(std::string_view bytes) noexcept;

/// Length in bytes of the longest prefix of `bytes` that is well-formed UTF-8.
[[nodiscard]] size_t utf8_valid_prefix_bytes(std::string_view bytes) noexcept;

/// Code point of the well-formed sequence that starts `bytes`; `sequence_bytes` is its length.
[[nodiscard]] uint32_t utf8_code_point(std::string_view bytes, int32_t sequence_bytes) noexcept;

/// Appends the UTF-8 form of `code_point`, which must be a Unicode scalar value.
void append_utf8(uint32_t code_point, std::string& out);

/// Turns the bytes of decoded tokens into text that is safe to print or to put in JSON.
///
/// A character may span several tokens, so the start of a sequence is held back until its end has come. Bytes that can
/// never become a character are shown as U+FFFD, one per maximal ill-formed part: the practice Unicode recommends
/// (table 3-8), and the one of Python's incremental decoder with errors='replace'.
class Utf8Stream {
 public:
  /// Takes the next bytes and returns what can be shown now; always well-formed UTF-8.
  [[nodiscard]] std::string push(std::string_view bytes);

  /// Ends the stream: a sequence still held back becomes U+FFFD.
  [[nodiscard]] std::string finish();

 private:
  std::string held_;  // at most 3 bytes: a proper prefix of some well-formed sequence
};

}  // namespace compact::engine
