// Visibility of a KV tile, on accumulator fragments (layout: softmax.cuh).
#pragma once

#include <cmath>

namespace compact {

// Row h of the thread sees the columns below visible_columns[h] (counted from the tile's first column; may be negative
// or larger than the tile). Selects -inf, never adds: a score of a masked column may be NaN, a real score may be below
// any finite stand-in.
template <int kCount>
__device__ __forceinline__ void mask_columns(float (&s)[kCount], const int (&visible_columns)[2], int lane) {
  const int first = visible_columns[0] - 2 * (lane % 4);
  const int second = visible_columns[1] - 2 * (lane % 4);
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    s[4 * j] = 8 * j < first ? s[4 * j] : -INFINITY;
    s[4 * j + 1] = 8 * j + 1 < first ? s[4 * j + 1] : -INFINITY;
    s[4 * j + 2] = 8 * j < second ? s[4 * j + 2] : -INFINITY;
    s[4 * j + 3] = 8 * j + 1 < second ? s[4 * j + 3] : -INFINITY;
  }
}

}  // namespace compact
