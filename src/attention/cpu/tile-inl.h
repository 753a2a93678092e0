// A tile of packed query rows in lanes: its state, and the parts of a step that no element type changes.
// Include inside foreach_target.
//
// Rows lie in lanes: S^T[key][row], O^T[d][row]. Maximum, exponential and sum of the online softmax are then vertical.
#if defined(COMPACT_ATTENTION_CPU_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef COMPACT_ATTENTION_CPU_TILE_INL_H_
#undef COMPACT_ATTENTION_CPU_TILE_INL_H_
#else
#define COMPACT_ATTENTION_CPU_TILE_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>

#include "hwy/highway.h"
#include "src/attention/cpu/item.h"
#include "src/attention/cpu/transpose-inl.h"

HWY_BEFORE_NAMESPACE();
namespace compact::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

// M = vectors * lanes rows, the first `rows` in use. 64-byte aligned parts of the thread's scratch.
struct Tile {
  void* qt = nullptr;             // [D, M] as the kernel likes it
  float* ot = nullptr;            // [D, M]
  float* row_max = nullptr;       // [M]     in units of log2
  float* row_sum = nullptr;       // [M]
  float* rescale = nullptr;       // [M]
  std::int32_t* limit = nullptr;  // [M]     the row sees list coordinates below it
  std::int32_t vectors = 0;
  std::int32_t rows = 0;
  std::int32_t least_limit = 0;  // over the rows in use
  std::int32_t most_limit = 0;
  std::int64_t first_row = 0;  // packed
  bool started = false;        // O^T holds something
};

// Visible limits and running state of the rows [first_row, first_row + rows) of the unit.
HWY_INLINE void reset_tile(const Call& call, const AttentionUnit& unit, std::int64_t first_row, std::int64_t rows,
                           std::int64_t m, Tile& tile) {
  tile.vectors = static_cast<std::int32_t>(m / static_cast<std::int64_t>(hn::Lanes(DF())));
  tile.rows = static_cast<std::int32_t>(rows);
  tile.first_row = first_row;
  tile.started = false;
  for (std::int64_t r = 0; r < m; ++r) {
    const std::int64_t row = first_row + (r < rows ? r : rows - 1);  // padding: the last row's limit
    const std::int64_t sees = std::int64_t{unit.past_tokens} + unit.causal_shift + row / call.input.heads_per_unit + 1;
    tile.limit[r] = sees < unit.list_tokens ? static_cast<std::int32_t>(sees) : unit.list_tokens;
    // Padding is never nearer to its maximum than a real row: it cannot keep a block from being skipped.
    tile.row_max[r] = r < rows ? std::numeric_limits<float>::lowest() : std::numeric_limits<float>::max();
    tile.row_sum[r] = 0;
  }
  tile.least_limit = tile.limit[0];
  tile.most_limit = tile.limit[rows - 1];
}

// Rows of Q for the four packed rows from `row` on; zeros for those at or behind end_row.
HWY_INLINE void query_rows(const Call& call, const AttentionUnit& unit, std::int64_t row, std::int64_t end_row,
                           const float* (&q)[4]) {
  alignas(64) static constexpr float kZeros[256] = {};
  const std::int32_t heads = call.input.heads_per_unit;
  for (std::int64_t k = 0; k < 4; ++k) {
    q[k] = row + k >= end_row ? kZeros
                              : call.input.q.row(unit.q_begin + static_cast<std::int32_t>((row + k) / heads),
                                                 unit.q_head + static_cast<std::int32_t>((row + k) % heads));
  }
}

// O^T / sum to rows of O, and LSE.
HWY_INLINE void finish_tile(const Call& call, const AttentionUnit& unit, const Tile& tile) {
  using D4 = hn::FixedTag<float, 4>;
  const D4 d4;
  const std::int64_t m = tile.vectors * static_cast<std::int64_t>(hn::Lanes(DF()));
  const std::int64_t head_dim = call.input.q.head_dim;
  const std::int32_t heads = call.input.heads_per_unit;
  if (!tile.started) std::fill_n(tile.ot, head_dim * m, 0.0F);
  for (std::int32_t r = 0; r < tile.rows; r += 4) {
    const std::int32_t group = tile.rows - r < 4 ? tile.rows - r : 4;
    alignas(16) float nowhere[256];
    float* o[4] = {nowhere, nowhere, nowhere, nowhere};
    float inverse[4] = {};
    for (std::int32_t k = 0; k < group; ++k) {
      const std::int64_t row = tile.first_row + r + k;
      const std::int32_t token = unit.q_begin + static_cast<std::int32_t>(row / heads);
      const std::int32_t head = unit.q_head + static_cast<std::int32_t>(row % heads);
      const float sum = tile.row_sum[r + k];
      inverse[k] = sum == 0 ? 0.0F : 1.0F / sum;
      o[k] = call.output.o.row(token, head);
      if (call.output.lse == nullptr) continue;
      const double lse = double{tile.row_max[r + k]} * std::numbers::ln2 + std::log(double{sum});
      call.output.lse[std::int64_t{token} * call.input.q.heads + head] =
          sum == 0 ? -std::numeric_limits<float>::infinity() : static_cast<float>(lse);
    }
    for (std::int64_t i = 0; i < head_dim; i += 4) {
      hn::Vec<D4> part[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) part[k] = hn::Load(d4, tile.ot + (i + k) * m + r);
      transpose_4x4<float>(part);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) hn::StoreU(hn::Mul(part[k], hn::Set(d4, inverse[k])), d4, o[k] + i);
    }
  }
}

// Scores of keys at list coordinates first_key + key that a row does not see become -inf.
template <int kV>
HWY_INLINE void mask_scores(DF d, std::int32_t first_key, std::int32_t num_keys, const std::int32_t* HWY_RESTRICT limit,
                            float* HWY_RESTRICT scores) {
  const hn::RebindToSigned<DF> di;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const VF hidden = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (std::int32_t key = 0; key < num_keys; ++key) {
    for (int v = 0; v < kV; ++v) {
      float* HWY_RESTRICT s = scores + (key * kV + v) * lanes;
      const auto seen = hn::Lt(hn::Set(di, first_key + key), hn::Load(di, limit + v * lanes));
      hn::Store(hn::IfThenElse(hn::RebindMask(d, seen), hn::Load(d, s), hidden), d, s);
    }
  }
}

// Largest score of each row in the block.
template <int kV>
HWY_INLINE void largest_scores(DF d, std::int32_t num_keys, const float* HWY_RESTRICT scores, VF* HWY_RESTRICT most) {
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (int v = 0; v < kV; ++v) {
    const float* HWY_RESTRICT s = scores + v * lanes;
    VF max0 = hn::Load(d, s);
    VF max1 = max0;
    VF max2 = max0;
    VF max3 = max0;
    std::int32_t key = 0;
    for (; key + 4 <= num_keys; key += 4) {  // four chains: a maximum has four cycles of latency
      max0 = hn::Max(max0, hn::Load(d, s + (key + 0) * kV * lanes));
      max1 = hn::Max(max1, hn::Load(d, s + (key + 1) * kV * lanes));
      max2 = hn::Max(max2, hn::Load(d, s + (key + 2) * kV * lanes));
      max3 = hn::Max(max3, hn::Load(d, s + (key + 3) * kV * lanes));
    }
    for (; key < num_keys; ++key) max0 = hn::Max(max0, hn::Load(d, s + key * kV * lanes));
    most[v] = hn::Max(hn::Max(max0, max1), hn::Max(max2, max3));
  }
}

// Skip-softmax (docs/design/method.md 6.4): no row's largest score comes within log2(lambda) of its running maximum. A
// row whose maximum is still the lowest finite value has seen nothing and never agrees; NaN never agrees.
template <int kV>
HWY_INLINE bool block_is_negligible(DF d, const VF* HWY_RESTRICT most, const float* HWY_RESTRICT row_max,
                                    float log2_lambda) {
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const VF bound = hn::Set(d, log2_lambda);
  for (int v = 0; v < kV; ++v) {
    const VF above = hn::Sub(most[v], hn::Load(d, row_max + v * lanes));
    if (!hn::AllTrue(d, hn::Lt(above, bound))) return false;
  }
  return true;
}

}  // namespace HWY_NAMESPACE
}  // namespace compact::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
