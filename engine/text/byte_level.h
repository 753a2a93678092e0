/// The byte alphabet of GPT-2 style tokenizers.
///
/// Such a tokenizer.json spells each byte of a token as one printable character: the 188 printable bytes of Latin-1
/// stand for themselves, the 68 others take U+0100 upward in order (a space is U+0120, a line feed U+010A). We keep
/// tokens as raw bytes and meet the alphabet only when reading the file and when a token is named from outside.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace compact::engine {

/// The character that spells `byte`.
[[nodiscard]] uint32_t byte_level_character(uint8_t byte) noexcept;

/// The spelling of `bytes`, in UTF-8.
[[nodiscard]] std::string byte_level_spell(std::string_view bytes);

/// The bytes that `spelling` stands for; none if a character lies outside the alphabet or the UTF-8 is broken.
[[nodiscard]] std::optional<std::string> byte_level_bytes(std::string_view spelling);

}  // namespace compact::engine
