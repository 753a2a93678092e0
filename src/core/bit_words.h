/// Bit sets in 64-bit words, bit j (LSB first) of word j / 64: rows of a block mask and their unions.
#pragma once

#include <bit>
#include <cstdint>

namespace compact {

[[nodiscard]] constexpr std::int32_t words_for_bits(std::int32_t bits) noexcept { return (bits + 63) / 64; }

[[nodiscard]] constexpr bool test_bit(const std::uint64_t* words, std::int32_t bit) noexcept {
  return ((words[bit / 64] >> (bit % 64)) & 1U) != 0;
}

constexpr void set_bit(std::uint64_t* words, std::int32_t bit) noexcept {
  words[bit / 64] |= std::uint64_t{1} << (bit % 64);
}

/// Sets the bits [begin, end); nothing if end <= begin.
constexpr void set_bits(std::uint64_t* words, std::int32_t begin, std::int32_t end) noexcept {
  while (begin < end) {
    const std::int32_t low = begin % 64;
    const std::int32_t count = end - begin < 64 - low ? end - begin : 64 - low;
    words[begin / 64] |= (~std::uint64_t{0} >> (64 - count)) << low;
    begin += count;
  }
}

/// True if a bit at or above `first` is set in words[0, num_words).
[[nodiscard]] constexpr bool any_bit_from(const std::uint64_t* words, std::int32_t num_words,
                                          std::int32_t first) noexcept {
  for (std::int32_t word = first / 64; word < num_words; ++word) {
    const std::uint64_t mask = word == first / 64 ? ~std::uint64_t{0} << (first % 64) : ~std::uint64_t{0};
    if ((words[word] & mask) != 0) return true;
  }
  return false;
}

/// Calls visit(bit) for every set bit of words[0, num_words), ascending.
template <class Visit>
constexpr void for_each_bit(const std::uint64_t* words, std::int32_t num_words, Visit visit) {
  for (std::int32_t word = 0; word < num_words; ++word) {
    for (std::uint64_t rest = words[word]; rest != 0; rest &= rest - 1) visit(word * 64 + std::countr_zero(rest));
  }
}

}  // namespace compact
