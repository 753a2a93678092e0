// The end of an item: output fragments (layout: softmax.cuh) go to global memory straight from registers.
#pragma once

#include <cmath>
#include <cstdint>

#include "src/attention/cuda/prefill_params.h"
#include "src/attention/softmax.cuh"
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

// 1 / sum of a row; 0 for a row that saw nothing. A NaN stays visible.
__device__ __forceinline__ float normaliser(float row_sum) { return row_sum == 0.0f ? 0.0f : 1.0f / row_sum; }

// Natural LSE. A row that saw nothing: its maximum and log2(0) are -inf, and so is their sum.
__device__ __forceinline__ float natural_lse(float max_log2, float row_sum) {
  constexpr float kLn2 = 0.693147180559945309f;
  return (max_log2 + log2f(row_sum)) * kLn2;
}

// Writes the thread's rows first_row and first_row + 8 of an item's tile of kTileRows rows: final rows, or the item's
// partial slot with its padding rows. row_sum: the thread's share.
template <ptx::MmaType kType, int kTileRows, int kCount>
__device__ __forceinline__ void store_item_rows(const PrefillOutput& output, const WorkItem& item,
                                                const float (&o)[kCount], const float (&row_max)[2],
                                                const float (&row_sum)[2], float scale_log2, int first_row, int lane) {
  constexpr int kHeadDim = 2 * kCount;
  const float sum[2] = {quad_sum(row_sum[0]), quad_sum(row_sum[1])};
  if (item.partial_slot >= 0) {
    const std::int64_t slot_row = std::int64_t{item.partial_slot} * kTileRows + first_row;
    store_partial_rows(o, {output.partial_o + slot_row * kHeadDim, output.partial_o + (slot_row + 8) * kHeadDim}, lane);
    if (lane % 4 == 0) {
      for (int h = 0; h < 2; ++h) {
        reinterpret_cast<float2*>(output.partial_m_l)[slot_row + 8 * h] = make_float2(row_max[h] * scale_log2, sum[h]);
      }
    }
    return;
  }
  std::uint16_t* rows[2];
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + 8 * h, token_in_tile = row >> output.heads_per_tile_log2;
    const int head = item.q_head + (row & ((1 << output.heads_per_tile_log2) - 1));
    const bool exists = token_in_tile < item.q_rows_valid;
    const std::int64_t token = item.q_row + token_in_tile;
    rows[h] = exists ? output.o + token * output.o_token_stride + head * output.o_head_stride : nullptr;
    if (output.lse != nullptr && exists && lane % 4 == 0) {
      output.lse[token * output.num_q_heads + head] = natural_lse(row_max[h] * scale_log2, sum[h]);
    }
  }
  store_output_rows<kType>(o, {normaliser(sum[0]), normaliser(sum[1])}, rows, lane);
}

}  // namespace compact
