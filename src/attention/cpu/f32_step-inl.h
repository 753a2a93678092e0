// fp32: the arithmetic of one tile of rows against one block of keys, for the instruction set being compiled.
// Include inside foreach_target.
//
// Every product is a broadcast of one element of K or V times vectors of rows. K and V are read where they lie, one
// pointer per key.
#if defined(COMPACT_ATTENTION_CPU_F32_STEP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef COMPACT_ATTENTION_CPU_F32_STEP_INL_H_
#undef COMPACT_ATTENTION_CPU_F32_STEP_INL_H_
#else
#define COMPACT_ATTENTION_CPU_F32_STEP_INL_H_
#endif

#include <cstdint>

#include "hwy/highway.h"
#include "src/attention/cpu/tile-inl.h"
#include "src/core/fast_exp2-inl.h"

HWY_BEFORE_NAMESPACE();
namespace compact::cpu {
namespace HWY_NAMESPACE {
using compact::HWY_NAMESPACE::fast_exp2;

// Register block: kVectors vectors of rows x kBroadcasts keys (or values of d). 32 registers hold 3 x 8 accumulators, 3
// row vectors and a broadcast; 16 hold 2 x 4 + 2 + 1 (2 x 6 would not divide D). Both give the two FMA ports enough
// chains.
#if HWY_TARGET <= HWY_AVX3 || HWY_TARGET == HWY_NEON || HWY_TARGET == HWY_PPC8
constexpr int kVectors = 3;
constexpr int kBroadcasts = 8;
#else
constexpr int kVectors = 2;
constexpr int kBroadcasts = 4;
#endif

// scores[key][M] = sum_d k_rows[key][d] * qt[d][M] for kBroadcasts keys; M = kV vectors.
template <int kV>
HWY_INLINE void scores_of_keys(DF d, const float* HWY_RESTRICT qt, const float* const* HWY_RESTRICT k_rows,
                               std::int64_t head_dim, float* HWY_RESTRICT scores) {
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  VF acc[kBroadcasts][kV];
  const float* row[kBroadcasts];
#pragma GCC unroll 8
  for (int j = 0; j < kBroadcasts; ++j) {
    row[j] = k_rows[j];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) acc[j][v] = hn::Zero(d);
  }
  for (std::int64_t i = 0; i < head_dim; ++i, qt += kV * lanes) {
    VF q[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) q[v] = hn::Load(d, qt + v * lanes);
#pragma GCC unroll 8
    for (int j = 0; j < kBroadcasts; ++j) {
      const VF k = hn::Set(d, row[j][i]);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) acc[j][v] = hn::MulAdd(k, q[v], acc[j][v]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kBroadcasts; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) hn::Store(acc[j][v], d, scores + (j * kV + v) * lanes);
  }
}

// ot[j][M] = ot[j][M] * rescale[M] + sum_key v_rows[key][d0 + j] * weights[key][M] for kBroadcasts values of j. The sum
// starts at zero: rounding errors grow with the block and the number of blocks, not with the whole list.
template <int kV>
HWY_INLINE void mix_values(DF d, const float* HWY_RESTRICT weights, const float* const* HWY_RESTRICT v_rows,
                           std::int64_t num_keys, std::int64_t d0, const float* HWY_RESTRICT rescale,
                           float* HWY_RESTRICT ot) {
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  VF acc[kBroadcasts][kV];
#pragma GCC unroll 8
  for (int j = 0; j < kBroadcasts; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) acc[j][v] = hn::Zero(d);
  }
  for (std::int64_t key = 0; key < num_keys; ++key, weights += kV * lanes) {
    const float* HWY_RESTRICT value = v_rows[key] + d0;
    VF p[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) p[v] = hn::Load(d, weights + v * lanes);
#pragma GCC unroll 8
    for (int j = 0; j < kBroadcasts; ++j) {
      const VF x = hn::Set(d, value[j]);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) acc[j][v] = hn::MulAdd(x, p[v], acc[j][v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) {
    const VF scale = hn::Load(d, rescale + v * lanes);
#pragma GCC unroll 8
    for (int j = 0; j < kBroadcasts; ++j) {
      float* HWY_RESTRICT out = ot + (j * kV + v) * lanes;
      hn::Store(hn::MulAdd(hn::Load(d, out), scale, acc[j][v]), d, out);
    }
  }
}

// Online softmax of a block: scores become weights, running maximum and sum move on, rescale is what O^T must be
// multiplied with. The maximum starts at the lowest finite value, so -inf minus the maximum is never a NaN. `bias` adds
// to every score, `most` includes it.
template <int kV>
HWY_INLINE void soften_scores(DF d, std::int32_t num_keys, const VF* HWY_RESTRICT most, float bias,
                              float* HWY_RESTRICT scores, float* HWY_RESTRICT row_max, float* HWY_RESTRICT row_sum,
                              float* HWY_RESTRICT rescale) {
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (int v = 0; v < kV; ++v) {
    float* HWY_RESTRICT s = scores + v * lanes;
    const VF old_max = hn::Load(d, row_max + v * lanes);
    const VF new_max = hn::Max(old_max, most[v]);
    const VF subtract = hn::Sub(new_max, hn::Set(d, bias));
    VF sum0 = hn::Zero(d);
    VF sum1 = hn::Zero(d);
    std::int32_t key = 0;
    for (; key + 2 <= num_keys; key += 2) {
      float* HWY_RESTRICT a = s + key * kV * lanes;
      float* HWY_RESTRICT b = a + kV * lanes;
      const VF weight0 = fast_exp2(d, hn::Sub(hn::Load(d, a), subtract));
      const VF weight1 = fast_exp2(d, hn::Sub(hn::Load(d, b), subtract));
      hn::Store(weight0, d, a);
      hn::Store(weight1, d, b);
      sum0 = hn::Add(sum0, weight0);
      sum1 = hn::Add(sum1, weight1);
    }
    if (key < num_keys) {
      float* HWY_RESTRICT a = s + key * kV * lanes;
      const VF weight = fast_exp2(d, hn::Sub(hn::Load(d, a), subtract));
      hn::Store(weight, d, a);
      sum0 = hn::Add(sum0, weight);
    }
    const VF scale = fast_exp2(d, hn::Sub(old_max, new_max));
    hn::Store(new_max, d, row_max + v * lanes);
    hn::Store(scale, d, rescale + v * lanes);
    hn::Store(hn::MulAdd(hn::Load(d, row_sum + v * lanes), scale, hn::Add(sum0, sum1)), d, row_sum + v * lanes);
  }
}

// A block of keys with its values: list coordinates [first_key, first_key + num_keys), or means of dropped pages, which
// every row sees.
struct KeyBlock {
  const float* const* k_rows = nullptr;  // [num_keys, padded to a multiple of kBroadcasts with valid pointers]
  const float* const* v_rows = nullptr;  // [num_keys]
  std::int32_t num_keys = 0;
  std::int32_t first_key = 0;
  float bias = 0;        // added to every score, in units of log2
  bool may_hide = true;  // rows have limits
};

// Returns false if the block was skipped.
template <int kV>
HWY_NOINLINE bool f32_step(const Tile& tile, std::int64_t head_dim, const KeyBlock& block, float log2_lambda,
                           float* scores) {
  const DF d;
  const std::int64_t m = kV * static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int32_t key = 0; key < block.num_keys; key += kBroadcasts) {
    scores_of_keys<kV>(d, static_cast<const float*>(tile.qt), block.k_rows + key, head_dim, scores + key * m);
  }
  if (block.may_hide && block.first_key + block.num_keys > tile.least_limit) {
    mask_scores<kV>(d, block.first_key, block.num_keys, tile.limit, scores);
  }
  VF most[kV];
  largest_scores<kV>(d, block.num_keys, scores, most);
  for (int v = 0; v < kV; ++v) most[v] = hn::Add(most[v], hn::Set(d, block.bias));
  if (block_is_negligible<kV>(d, most, tile.row_max, log2_lambda)) return false;
  soften_scores<kV>(d, block.num_keys, most, block.bias, scores, tile.row_max, tile.row_sum, tile.rescale);
  for (std::int64_t d0 = 0; d0 < head_dim; d0 += kBroadcasts) {
    mix_values<kV>(d, scores, block.v_rows, block.num_keys, d0, tile.rescale, tile.ot + d0 * m);
  }
  return true;
}

}  // namespace HWY_NAMESPACE
}  // namespace compact::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
