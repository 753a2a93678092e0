/// Short names for contents: tells settings, files and checkpoints apart in reports. Not a protection against anyone.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include "compact/status.h"

namespace compact::engine {

inline constexpr std::uint64_t kFnvBasis = 0xcbf29ce484222325U;

/// FNV-1a, 64 bits; `start` continues an earlier one.
[[nodiscard]] std::uint64_t fnv1a64(std::string_view bytes, std::uint64_t start = kFnvBasis) noexcept;

/// Sixteen hexadecimal digits.
[[nodiscard]] std::string hex_digest(std::uint64_t value);

/// Digest of a model directory: config.json and tokenizer.json in full; of every *.safetensors its name, length and 64
/// blocks of 4 KB spread over it, header included, so that a checkpoint of many gigabytes takes milliseconds.
/// Errors: kIoError for a file that cannot be read.
[[nodiscard]] Result<std::string> model_digest(const std::filesystem::path& directory);

}  // namespace compact::engine
