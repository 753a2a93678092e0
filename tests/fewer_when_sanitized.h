/// Sanitized code is five to twenty times slower: generated cases are fewer there, and still see every kind of input.
#pragma once

#include <cstdint>

namespace compact::testing {

constexpr std::uint32_t fewer_when_sanitized(std::uint32_t cases) {
#ifdef COMPACT_SANITIZED
  return (cases + 7) / 8;
#else
  return cases;
#endif
}

}  // namespace compact::testing
