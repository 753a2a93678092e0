// log2 of one instruction.
#pragma once

namespace compact::ptx {

// log2(x), absolute error below 2^-22 near 1, relative below 2^-22 elsewhere; subnormal x counts as 0.
__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace compact::ptx
