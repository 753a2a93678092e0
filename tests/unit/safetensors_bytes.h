/// Builds safetensors files by hand, wrong ones included.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace compact::testing {

/// The length as the format writes it: 8 bytes, little endian.
inline std::string u64_le(std::uint64_t value) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>((value >> (8 * i)) & 0xff));
  return bytes;
}

/// Length, header, then `data_bytes` bytes counting 0, 1, 2, ...
inline std::string safetensors_bytes(std::string_view header, std::size_t data_bytes) {
  std::string file = u64_le(header.size());
  file += header;
  for (std::size_t i = 0; i < data_bytes; ++i) file.push_back(static_cast<char>(i & 0xff));
  return file;
}

inline std::span<const std::byte> as_bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

}  // namespace compact::testing
