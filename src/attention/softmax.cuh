// Online softmax on accumulator fragments. mma.sync and wgmma give a thread the same elements: two rows (lane/4 and
// lane/4 + 8), of each the columns 8j + 2*(lane%4) + {0, 1}; s[4j], s[4j+1] belong to the first row, s[4j+2], s[4j+3]
// to the second. The four lanes of a quad share their rows.
#pragma once

#include <cmath>
#include <cstdint>

#include "src/ptx/control.cuh"
#include "src/ptx/convert.cuh"
#include "src/ptx/quad.cuh"

namespace compact {

using ptx::quad_max;
using ptx::quad_sum;

// s: scores in, exp2((s - max) * scale_log2) out. row_sum is this thread's share: sum it over the quad at the end.
// rescale: factor for everything that was accumulated under the old maximum.
// kMayBeEmpty: rows may have seen nothing yet (maximum -inf); without it at least one score of a row is finite.
template <bool kMayBeEmpty, int kCount>
__device__ __forceinline__ void online_softmax(float (&s)[kCount], float (&row_max)[2], float (&row_sum)[2],
                                               float (&rescale)[2], float scale_log2) {
  static_assert(kCount % 8 == 0);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    // Two chains each: one would be bound by latency.
    float max_even = s[2 * row], max_odd = s[2 * row + 1];
#pragma unroll
    for (int i = 4 + 2 * row; i < kCount; i += 4) {
      max_even = fmaxf(max_even, s[i]);
      max_odd = fmaxf(max_odd, s[i + 1]);
    }
    const float new_max = fmaxf(row_max[row], quad_max(fmaxf(max_even, max_odd)));
    const float shift = kMayBeEmpty && new_max == -INFINITY ? 0.0f : new_max * scale_log2;
    rescale[row] = ptx::fast_exp2(fmaf(row_max[row], scale_log2, -shift));
    row_max[row] = new_max;
    float sum_even = row_sum[row] * rescale[row], sum_odd = 0.0f;
#pragma unroll
    for (int i = 2 * row; i < kCount; i += 4) {
      s[i] = ptx::fast_exp2(fmaf(s[i], scale_log2, -shift));
      s[i + 1] = ptx::fast_exp2(fmaf(s[i + 1], scale_log2, -shift));
      sum_even += s[i];
      sum_odd += s[i + 1];
    }
    row_sum[row] = sum_even + sum_odd;
  }
}

template <int kCount>
__device__ __forceinline__ void rescale_rows(float (&o)[kCount], const float (&rescale)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] *= rescale[i % 4 / 2];
}

// Registers 4k .. 4k+3 of p become the A fragment of reduction step k.
template <ptx::MmaType kType, int kCount>
__device__ __forceinline__ void pack_probabilities(std::uint32_t (&p)[kCount / 2], const float (&s)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) p[i] = ptx::pack_pair<kType>(s[2 * i], s[2 * i + 1]);
}

}  // namespace compact
