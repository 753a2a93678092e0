#include "engine/text/utf8.h"

#include <cstring>

namespace compact::engine {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

struct Lead {
  int32_t bytes;       // length of the sequences this byte starts; 0 if it starts none
  uint8_t second_min;  // range of the second byte: this is where overlongs, surrogates and > U+10FFFF are refused
  uint8_t second_max;
};

Lead lead_of(uint8_t byte) noexcept {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xC2) return {0, 0, 0};
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte < 0xF0) {
    const uint8_t min = byte == 0xE0 ? 0xA0 : 0x80;
    const uint8_t max = byte == 0xED ? 0x9F : 0xBF;
    return {3, min, max};
  }
  if (byte < 0xF5) {
    const uint8_t min = byte == 0xF0 ? 0x90 : 0x80;
    const uint8_t max = byte == 0xF4 ? 0x8F : 0xBF;
    return {4, min, max};
  }
  return {0, 0, 0};
}

struct Scan {
  int32_t good_bytes;    // leading bytes that agree with some well-formed sequence
  int32_t wanted_bytes;  // length of that sequence; 0 if the first byte starts none
};

Scan scan_sequence(std::string_view bytes) noexcept {
  if (bytes.empty()) return {0, 0};
  const Lead lead = lead_of(static_cast<uint8_t>(bytes[0]));
  if (lead.bytes == 0) return {0, 0};
  int32_t good = 1;
  while (good < lead.bytes && static_cast<size_t>(good) < bytes.size()) {
    const uint8_t byte = static_cast<uint8_t>(bytes[static_cast<size_t>(good)]);
    const uint8_t min = good == 1 ? lead.second_min : uint8_t{0x80};
    const uint8_t max = good == 1 ? lead.second_max : uint8_t{0xBF};
    if (byte < min || byte > max) break;
    ++good;
  }
  return {good, lead.bytes};
}

}  // namespace

int32_t utf8_sequence_bytes(std::string_view bytes) noexcept {
  const Scan scan = scan_sequence(bytes);
  return scan.wanted_bytes > 0 && scan.good_bytes == scan.wanted_bytes ? scan.wanted_bytes : 0;
}

size_t utf8_valid_prefix_bytes(std::string_view bytes) noexcept {
  size_t pos = 0;
  while (pos < bytes.size()) {
    // Most text is ASCII: eight bytes at a time while no high bit is set.
    while (pos + 8 <= bytes.size()) {
      uint64_t word = 0;
      std::memcpy(&word, bytes.data() + pos, sizeof word);
      if ((word & 0x8080808080808080ULL) != 0) break;
      pos += 8;
    }
    if (pos == bytes.size()) break;
    const int32_t length = utf8_sequence_bytes(bytes.substr(pos, 4));
    if (length == 0) break;
    pos += static_cast<size_t>(length);
  }
  return pos;
}

uint32_t utf8_code_point(std::string_view bytes, int32_t sequence_bytes) noexcept {
  const uint8_t first = static_cast<uint8_t>(bytes[0]);
  if (sequence_bytes == 1) return first;
  uint32_t code_point = first & (0x7Fu >> sequence_bytes);
  for (int32_t i = 1; i < sequence_bytes; ++i) {
    code_point = code_point << 6 | (static_cast<uint8_t>(bytes[static_cast<size_t>(i)]) & 0x3Fu);
  }
  return code_point;
}

void append_utf8(uint32_t code_point, std::string& out) {
  const auto put = [&out](uint32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | code_point >> 6);
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    put(0xE0 | code_point >> 12);
    put(0x80 | (code_point >> 6 & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | code_point >> 18);
    put(0x80 | (code_point >> 12 & 0x3F));
    put(0x80 | (code_point >> 6 & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
}

std::string Utf8Stream::push(std::string_view bytes) {
  std::string pending = std::move(held_);
  held_.clear();
  pending.append(bytes);

  std::string shown;
  shown.reserve(pending.size());
  std::string_view rest = pending;
  while (!rest.empty()) {
    const size_t valid = utf8_valid_prefix_bytes(rest);
    shown.append(rest.substr(0, valid));
    rest.remove_prefix(valid);
    if (rest.empty()) break;

    const Scan scan = scan_sequence(rest);
    if (scan.good_bytes > 0 && static_cast<size_t>(scan.good_bytes) == rest.size()) {
      held_ = rest;  // cut, not broken: the next token may complete it
      break;
    }
    shown.append(kReplacement);
    rest.remove_prefix(static_cast<size_t>(scan.good_bytes > 0 ? scan.good_bytes : 1));
  }
  return shown;
}

std::string Utf8Stream::finish() {
  const bool cut = !held_.empty();
  held_.clear();
  return cut ? std::string(kReplacement) : std::string();
}

}  // namespace compact::engine
