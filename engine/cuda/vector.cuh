// Eight bf16 values of a 16-byte load, and as fp32: what kernels bound by memory move.
#pragma once

#include <cuda_bf16.h>

#include "engine/cuda/kernels.h"

namespace compact::engine {

constexpr int kVector = 8;

struct alignas(16) Vector {
  __nv_bfloat162 pairs[kVector / 2];
};

__device__ __forceinline__ void widen(const Vector& v, float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const float2 pair = __bfloat1622float2(v.pairs[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ Vector narrow(const float (&x)[kVector]) {
  Vector v;
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) v.pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
  return v;
}

inline const Vector* vectors(const Bf16Bits* data) { return reinterpret_cast<const Vector*>(data); }

}  // namespace compact::engine
