#include "engine/text/byte_level.h"

#include <array>

#include "engine/text/utf8.h"

namespace compact::engine {
namespace {

constexpr uint32_t kFirstShifted = 0x100;
constexpr uint32_t kNumCharacters = kFirstShifted + 68;

constexpr bool stands_for_itself(uint32_t byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || (byte >= 0xAE && byte <= 0xFF);
}

struct Alphabet {
  std::array<uint16_t, 256> character{};
  std::array<int16_t, kNumCharacters> byte{};  // -1: no byte is spelled with this character
};

constexpr Alphabet make_alphabet() {
  Alphabet alphabet;
  for (int16_t& byte : alphabet.byte) byte = -1;
  uint32_t shifted = kFirstShifted;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const uint32_t character = stands_for_itself(byte) ? byte : shifted++;
    alphabet.character[byte] = static_cast<uint16_t>(character);
    alphabet.byte[character] = static_cast<int16_t>(byte);
  }
  return alphabet;
}

constexpr Alphabet kAlphabet = make_alphabet();

}  // namespace

uint32_t byte_level_character(uint8_t byte) noexcept { return kAlphabet.character[byte]; }

std::string byte_level_spell(std::string_view bytes) {
  std::string spelling;
  spelling.reserve(bytes.size());
  for (const char byte : bytes) append_utf8(byte_level_character(static_cast<uint8_t>(byte)), spelling);
  return spelling;
}

std::optional<std::string> byte_level_bytes(std::string_view spelling) {
  std::string bytes;
  bytes.reserve(spelling.size());
  while (!spelling.empty()) {
    const int32_t length = utf8_sequence_bytes(spelling);
    if (length == 0) return std::nullopt;
    const uint32_t character = utf8_code_point(spelling, length);
    if (character >= kNumCharacters || kAlphabet.byte[character] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(kAlphabet.byte[character]));
    spelling.remove_prefix(static_cast<size_t>(length));
  }
  return bytes;
}

}  // namespace compact::engine
