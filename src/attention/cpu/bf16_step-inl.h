// bf16: staging of a block of keys, and one tile of rows against it. Include inside foreach_target.
//
// Both products have the operand layout of AMX (bf16_product.h): rows of A are K (S^T = K Q^T) and V^T (O^T = V^T P^T),
// pairs of B are Q and P^T. K is therefore read where it lies; V is transposed once per block and item.
#if defined(COMPACT_ATTENTION_CPU_BF16_STEP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef COMPACT_ATTENTION_CPU_BF16_STEP_INL_H_
#undef COMPACT_ATTENTION_CPU_BF16_STEP_INL_H_
#else
#define COMPACT_ATTENTION_CPU_BF16_STEP_INL_H_
#endif

#include <cstdint>
#include <limits>
#include <numbers>

#include "hwy/highway.h"
#include "src/attention/cpu/bf16_product.h"
#include "src/attention/cpu/tile-inl.h"
#include "src/core/bf16.h"
#include "src/core/fast_exp2-inl.h"

HWY_BEFORE_NAMESPACE();
namespace compact::cpu {
namespace HWY_NAMESPACE {
using compact::HWY_NAMESPACE::fast_exp2;

// The running maximum of a row moves only when it grows by more than 2^8: weights stay below 2^8 times a sum that fp32
// holds easily, and O^T is rescaled in the first blocks of a list instead of in most.
constexpr float kLazyMaximum = 8;

// Four fp32 values as bf16 bits in the low halves, round to nearest even.
HWY_INLINE hn::Vec<hn::FixedTag<std::uint32_t, 4>> bf16_bits(hn::Vec<hn::FixedTag<float, 4>> x) {
  const hn::FixedTag<std::uint32_t, 4> d;
  const auto bits = hn::BitCast(d, x);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d, 1U));
  return hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(d, 0x7fffU)), odd));
}

// Eight consecutive fp32 values as four pairs of bf16.
HWY_INLINE hn::Vec<hn::FixedTag<std::uint32_t, 4>> bf16_pairs(const float* HWY_RESTRICT x) {
  const hn::FixedTag<float, 4> d;
  const hn::FixedTag<std::uint32_t, 4> d32;
  const hn::FixedTag<std::uint16_t, 8> d16;
  const auto low = hn::BitCast(d16, bf16_bits(hn::LoadU(d, x)));
  const auto high = hn::BitCast(d16, bf16_bits(hn::LoadU(d, x + 4)));
  return hn::BitCast(d32, hn::ConcatEven(d16, high, low));
}

// vt[d][key] = v_rows[key][d] for num_keys keys, a multiple of 8; rows of vt are kKeys apart. Eight keys x eight d at a
// time. D is a multiple of 8.
template <int kKeys>
HWY_INLINE void transpose_values(const Bf16* const* HWY_RESTRICT v_rows, std::int32_t num_keys, std::int64_t head_dim,
                                 Bf16* HWY_RESTRICT vt) {
  const hn::FixedTag<std::uint16_t, 8> d16;
  const hn::FixedTag<std::uint32_t, 4> d32;
  for (std::int32_t key = 0; key < num_keys; key += 8) {
    const std::uint16_t* row[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) row[k] = reinterpret_cast<const std::uint16_t*>(v_rows[key + k]);
    for (std::int64_t i = 0; i < head_dim; i += 8) {
      hn::Vec<decltype(d32)> low[4];   // pairs of keys, d i .. i + 3
      hn::Vec<decltype(d32)> high[4];  // d i + 4 .. i + 7
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; ++pair) {
        const auto even = hn::LoadU(d16, row[2 * pair] + i);
        const auto odd = hn::LoadU(d16, row[2 * pair + 1] + i);
        low[pair] = hn::BitCast(d32, hn::InterleaveLower(d16, even, odd));
        high[pair] = hn::BitCast(d32, hn::InterleaveUpper(d16, even, odd));
      }
      transpose_4x4<std::uint32_t>(low);
      transpose_4x4<std::uint32_t>(high);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        hn::Store(low[k], d32, reinterpret_cast<std::uint32_t*>(vt + (i + k) * kKeys + key));
        hn::Store(high[k], d32, reinterpret_cast<std::uint32_t*>(vt + (i + 4 + k) * kKeys + key));
      }
    }
  }
}

// 2^x for x <= 16, relative error below 8e-5: a thirtieth of the rounding of its result to bf16. At least 2^-126:
// hidden keys keep a weight that no sum of fp32 notices.
HWY_INLINE VF short_exp2(DF d, VF x) {
  const hn::RebindToSigned<DF> di;
  const VF shift = hn::Set(d, 12582912.0F);  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const VF clamped = hn::Max(hn::Set(d, -126.0F), x);
  const VF shifted = hn::Add(clamped, shift);
  const VF f = hn::Sub(clamped, hn::Sub(shifted, shift));
  VF p = hn::Set(d, 5.517167e-2F);
  p = hn::MulAdd(p, f, hn::Set(d, 2.4261113e-1F));
  p = hn::MulAdd(p, f, hn::Set(d, 6.9326099e-1F));
  p = hn::MulAdd(p, f, hn::Set(d, 9.9992807e-1F));
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::BitCast(di, shifted))));
}

// Scores of the keys [0, num_keys), a multiple of 2, become weights rounded to bf16, in pairs of keys. They are summed
// as rounded, so that the weights of O sum to one. Returns whether a row's maximum moved: rescale is then what O^T must
// be multiplied with.
template <int kV>
HWY_INLINE bool soften_scores_bf16(DF d, std::int32_t num_keys, const VF* HWY_RESTRICT most, float scale, float bias,
                                   const float* HWY_RESTRICT scores, std::uint32_t* HWY_RESTRICT weights,
                                   const Tile& tile) {
  const hn::RebindToUnsigned<DF> du;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto half = hn::Set(du, 0x8000U);
  const auto upper = hn::Set(du, 0xffff0000U);
  const VF scales = hn::Set(d, scale);
  bool moved = false;
  for (int v = 0; v < kV; ++v) {
    const VF old_max = hn::Load(d, tile.row_max + v * lanes);
    const auto grown = hn::Gt(most[v], hn::Add(old_max, hn::Set(d, kLazyMaximum)));
    const VF new_max = hn::IfThenElse(grown, most[v], old_max);
    const VF subtract = hn::Sub(new_max, hn::Set(d, bias));
    VF sum0 = hn::Zero(d);
    VF sum1 = hn::Zero(d);
    const float* HWY_RESTRICT s = scores + v * lanes;
    for (std::int32_t key = 0; key < num_keys; key += 2, s += 2 * kV * lanes) {
      const VF weight0 = short_exp2(d, hn::MulSub(hn::Load(d, s), scales, subtract));
      const VF weight1 = short_exp2(d, hn::MulSub(hn::Load(d, s + kV * lanes), scales, subtract));
      const auto bits0 = hn::And(hn::Add(hn::BitCast(du, weight0), half), upper);
      const auto bits1 = hn::And(hn::Add(hn::BitCast(du, weight1), half), upper);
      sum0 = hn::Add(sum0, hn::BitCast(d, bits0));
      sum1 = hn::Add(sum1, hn::BitCast(d, bits1));
      hn::Store(hn::Or(hn::ShiftRight<16>(bits0), bits1), du, weights + (key / 2 * kV + v) * lanes);
    }
    moved = moved || !hn::AllFalse(d, grown);
    const VF rescale = fast_exp2(d, hn::Sub(old_max, new_max));
    hn::Store(new_max, d, tile.row_max + v * lanes);
    hn::Store(rescale, d, tile.rescale + v * lanes);
    hn::Store(hn::MulAdd(hn::Load(d, tile.row_sum + v * lanes), rescale, hn::Add(sum0, sum1)), d,
              tile.row_sum + v * lanes);
  }
  return moved;
}

// A block of keys, ready for the products: list coordinates [first_key, first_key + num_keys), or means of dropped
// pages, which every row sees.
struct Bf16Block {
  const Bf16* const* k_groups = nullptr;   // of 16 keys, padded to an even number with valid pointers
  const Bf16* const* vt_groups = nullptr;  // of 16 d
  std::int64_t k_stride = 0;               // elements between keys
  std::int64_t vt_stride = 0;
  std::int32_t num_keys = 0;
  std::int32_t first_key = 0;
  float bias = 0;        // added to every score, in units of log2
  bool may_hide = true;  // rows have limits
};

// kRows rows in kRows / lanes vectors. Returns false if the block was skipped.
template <int kRows>
HWY_NOINLINE bool bf16_step(const Call& call, Tile& tile, const Bf16Block& block, float* scores,
                            std::uint32_t* weights) {
  const DF d;
  constexpr int kV = kRows / static_cast<int>(hn::MaxLanes(DF()));
  const std::int32_t d_groups = (call.input.q.head_dim + 15) / 16;
  const std::int32_t padded_keys = (block.num_keys + 31) / 32 * 32;
  const auto scale = static_cast<float>(double{call.input.softmax_scale} * std::numbers::log2e);
  ProductArgs product{.a_groups = block.k_groups, .a_stride = block.k_stride, .n_groups = kRows / 16};
  product.b = static_cast<const Bf16*>(tile.qt);
  product.c = scores;
  product.m_groups = padded_keys / 16;
  product.k_steps = (call.input.q.head_dim + 31) / 32;
  call.product->multiply(product);

  if (!block.may_hide) {
    std::fill_n(scores + block.num_keys * kRows, (padded_keys - block.num_keys) * kRows,
                -std::numeric_limits<float>::infinity());
  } else if (block.first_key + padded_keys > tile.least_limit) {
    mask_scores<kV>(d, block.first_key, padded_keys, tile.limit, scores);
  }
  VF most[kV];
  largest_scores<kV>(d, padded_keys, scores, most);
  for (int v = 0; v < kV; ++v) most[v] = hn::MulAdd(most[v], hn::Set(d, scale), hn::Set(d, block.bias));
  if (block_is_negligible<kV>(d, most, tile.row_max, call.log2_lambda)) return false;
  const bool moved = soften_scores_bf16<kV>(d, padded_keys, most, scale, block.bias, scores, weights, tile);
  if (moved && tile.started) {
    for (std::int64_t i = 0; i < call.input.q.head_dim * kV; ++i) {
      float* o = tile.ot + i * static_cast<std::int64_t>(hn::Lanes(d));
      const VF factor = hn::Load(d, tile.rescale + i % kV * static_cast<std::int64_t>(hn::Lanes(d)));
      hn::Store(hn::Mul(hn::Load(d, o), factor), d, o);
    }
  }
  product.a_groups = block.vt_groups;
  product.a_stride = block.vt_stride;
  product.b = reinterpret_cast<const Bf16*>(weights);
  product.c = tile.ot;
  product.m_groups = d_groups;
  product.k_steps = padded_keys / 32;
  product.accumulate = tile.started;
  call.product->multiply(product);
  tile.started = true;
  return true;
}

}  // namespace HWY_NAMESPACE
}  // namespace compact::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
