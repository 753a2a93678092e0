/// Population count, logarithms of powers of two and bit ranges for host code, tests on the CPU and kernels.
#pragma once

#include <bit>
#include <cstdint>

#include "src/core/host_device.h"

namespace compact {

CA_HOST_DEVICE inline std::int32_t count_bits(std::uint64_t word) {
#ifdef __CUDA_ARCH__
  return __popcll(word);
#else
  return std::popcount(word);
#endif
}

inline std::int32_t log2_exact(std::int32_t power_of_two) {
  return std::countr_zero(static_cast<std::uint32_t>(power_of_two));
}

/// The bits of [begin, end) that lie in word `word` of a bit set.
CA_HOST_DEVICE constexpr std::uint64_t bits_in_word(std::int32_t begin, std::int32_t end, std::int32_t word) {
  const std::int32_t first = begin - word * 64 < 0 ? 0 : begin - word * 64;
  const std::int32_t last = end - word * 64 > 64 ? 64 : end - word * 64;
  return first >= last ? 0 : ~std::uint64_t{0} >> (64 - (last - first)) << first;
}

}  // namespace compact
