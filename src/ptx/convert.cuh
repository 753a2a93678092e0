// The 16-bit input types of the tensor cores.
#pragma once

#include <cstdint>

namespace compact::ptx {

enum class MmaType { kBf16, kF16 };

// Two fp32 to a register of two 16-bit values, round to nearest even; `low` is the element at the lower address.
template <MmaType kType>
__device__ __forceinline__ std::uint32_t pack_pair(float low, float high) {
  std::uint32_t pair;
  if constexpr (kType == MmaType::kBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

}  // namespace compact::ptx
