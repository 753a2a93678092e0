/// Whole files of text: prompts, calibrations, results.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include "compact/status.h"

namespace compact::engine {

/// All bytes of a file, or of standard input for "-". Any bytes are text here; invalid UTF-8 is the tokenizer's matter.
/// Errors: kIoError with the path and the system's reason.
[[nodiscard]] Result<std::string> read_text_file(const std::filesystem::path& path);

/// Checks that a result can be written later, so that a long run does not end in a bad path. Creates nothing that
/// stays.
[[nodiscard]] Status check_writable(const std::filesystem::path& path);

/// Writes beside the target and renames: the file is there whole or not at all. Errors: kIoError.
[[nodiscard]] Status write_text_file(const std::filesystem::path& path, std::string_view text);

}  // namespace compact::engine
