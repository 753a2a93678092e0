// Writing output fragments (layout: softmax.cuh) to global memory straight from registers.
#pragma once

#include <cstdint>

#include "src/ptx/convert.cuh"

namespace compact {

// Transposes the 4 x 4 matrix whose row r is r[0..3] of quad lane r: afterwards lane q holds what was register q of
// lanes 0..3. Four shuffles.
__device__ __forceinline__ void transpose_quad(std::uint32_t (&r)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const std::uint32_t received = __shfl_xor_sync(0xffffffffu, odd ? r[i] : r[i + 1], 1);
    r[i] = odd ? received : r[i];
    r[i + 1] = odd ? r[i + 1] : received;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? r[i] : r[i + 2], 2);
    r[i] = upper ? received : r[i];
    r[i + 2] = upper ? r[i + 2] : received;
  }
}

// Writes o[..] * factor as 16-bit values, 16 bytes per lane: a quad covers 64 consecutive bytes of a row, so every
// sector is written whole. rows[h]: start of the thread's row h, null to skip it (alike within a quad).
template <ptx::MmaType kType, int kCount>
__device__ __forceinline__ void store_output_rows(const float (&o)[kCount], const float (&factor)[2],
                                                  std::uint16_t* const (&rows)[2], int lane) {
  static_assert(kCount % 16 == 0, "a quad writes 32 columns at a time");
#pragma unroll
  for (int row = 0; row < 2; ++row) {
#pragma unroll
    for (int group = 0; group < kCount / 16; ++group) {
      std::uint32_t r[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* pair = &o[16 * group + 4 * j + 2 * row];
        r[j] = ptx::pack_pair<kType>(pair[0] * factor[row], pair[1] * factor[row]);
      }
      transpose_quad(r, lane);
      if (rows[row] != nullptr) {
        *reinterpret_cast<uint4*>(rows[row] + 32 * group + 8 * (lane % 4)) = make_uint4(r[0], r[1], r[2], r[3]);
      }
    }
  }
}

// Writes the accumulators as they are, fp32.
template <int kCount>
__device__ __forceinline__ void store_partial_rows(const float (&o)[kCount], float* const (&rows)[2], int lane) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      *reinterpret_cast<float2*>(rows[row] + 8 * j + 2 * (lane % 4)) =
          make_float2(o[4 * j + 2 * row], o[4 * j + 2 * row + 1]);
    }
  }
}

}  // namespace compact
