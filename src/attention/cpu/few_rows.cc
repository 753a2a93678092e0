// Units of few rows (decode steps): bound by memory, so K and V are read row after row, once, as they lie.
//
// Vectors run along D. A block of kFewKeys keys is scored (dot products, while the block's V is prefetched), softened
// per row across keys, and mixed into O with the rows' accumulators in registers. A long list is split into items of
// kSplitKeys keys whatever the number of threads; parts are merged in order (attention.cc).
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "src/attention/cpu/item.h"
#include "src/core/bf16.h"

#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#define HWY_WANT_SSE4 1
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/attention/cpu/few_rows.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "src/core/fast_exp2-inl.h"

#ifndef COMPACT_ATTENTION_CPU_FEW_ROWS_ONCE_
#define COMPACT_ATTENTION_CPU_FEW_ROWS_ONCE_
namespace compact::cpu {

/// Keys between two updates of the running maximum: K and V of a block (64 KB at D 128, fp32) stay in L2.
inline constexpr std::int32_t kFewKeys = 64;

/// One thread's scratch, and what it holds between blocks. Rows are padded to 1, 2, 4 or 8.
struct FewRows {
  float* q = nullptr;       // [kFewRows, D]  times softmax_scale * log2(e)
  float* o = nullptr;       // [kFewRows, D]
  float* scores = nullptr;  // [kFewRows, kFewKeys]
  float row_max[kFewRows];  // in units of log2
  float row_sum[kFewRows];
  std::int32_t limit[kFewRows];  // the row sees list coordinates below it
};

/// Keys of one block, where they lie. may_hide: rows have limits; else means of dropped pages.
template <class T>
struct FewKeysBlock {
  const T* k_rows[kFewKeys];
  const T* v_rows[kFewKeys];
  std::int32_t num_keys = 0;
  std::int32_t first_key = 0;
  float bias = 0;
  bool may_hide = true;
};

}  // namespace compact::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace compact::cpu {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;
using compact::HWY_NAMESPACE::fast_exp2;

// Accumulators that fit beside the operands: rows x vectors of D.
#if HWY_TARGET <= HWY_AVX3 || HWY_TARGET == HWY_NEON || HWY_TARGET == HWY_PPC8
constexpr int kAccumulators = 16;
#else
constexpr int kAccumulators = 8;
#endif

template <class D>
HWY_INLINE hn::Vec<D> load(D d, const float* from) {
  return hn::LoadU(d, from);
}
template <class D>
HWY_INLINE hn::Vec<D> load(D d, const Bf16* from) {
  const hn::Rebind<std::uint16_t, D> d16;
  const hn::Rebind<std::uint32_t, D> d32;
  const auto bits = hn::PromoteTo(d32, hn::LoadU(d16, reinterpret_cast<const std::uint16_t*>(from)));
  return hn::BitCast(d, hn::ShiftLeft<16>(bits));
}

// scores[r][key] = q_r . k_key
template <int kR, class D, class T>
HWY_INLINE void score_keys(D d, const FewKeysBlock<T>& block, std::int64_t head_dim, const FewRows& state) {
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
  for (std::int32_t key = 0; key < block.num_keys; ++key) {
    const T* HWY_RESTRICT k = block.k_rows[key];
    for (std::int64_t i = 0; i < head_dim; i += kLine) hwy::Prefetch(block.v_rows[key] + i);
    hn::Vec<D> sums[kR];
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) sums[r] = hn::Zero(d);
    for (std::int64_t i = 0; i < head_dim; i += lanes) {
      const auto x = load(d, k + i);
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) sums[r] = hn::MulAdd(x, hn::Load(d, state.q + r * head_dim + i), sums[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) state.scores[r * kFewKeys + key] = hn::GetLane(hn::SumOfLanes(d, sums[r]));
  }
}

// o[r][d] += sum over keys of weight[r][key] * v_key[d] for kC vectors of d.
template <int kR, int kC, class D, class T>
HWY_INLINE void mix_vectors(D d, const FewKeysBlock<T>& block, std::int64_t head_dim, std::int64_t i,
                            const FewRows& state) {
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  hn::Vec<D> sums[kR][kC];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) sums[r][c] = hn::Load(d, state.o + r * head_dim + i + c * lanes);
  }
  for (std::int32_t key = 0; key < block.num_keys; ++key) {
    hn::Vec<D> values[kC];
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) values[c] = load(d, block.v_rows[key] + i + c * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const auto weight = hn::Set(d, state.scores[r * kFewKeys + key]);
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) sums[r][c] = hn::MulAdd(weight, values[c], sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) hn::Store(sums[r][c], d, state.o + r * head_dim + i + c * lanes);
  }
}

// Scores of one row become weights; O is rescaled. The sum runs over whole vectors: what lies behind the keys is -inf.
template <class D>
HWY_INLINE void soften_row(D d, std::int64_t head_dim, std::int32_t num_keys, float block_max, float bias, int r,
                           FewRows& state) {
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  float* HWY_RESTRICT s = state.scores + r * kFewKeys;
  const float new_max = std::max(state.row_max[r], block_max);
  const auto rescale = fast_exp2(d, hn::Set(d, state.row_max[r] - new_max));
  const auto subtract = hn::Set(d, new_max - bias);
  auto sum = hn::Zero(d);
  for (std::int64_t key = 0; key < num_keys; key += lanes) {
    const auto weight = fast_exp2(d, hn::Sub(hn::Load(d, s + key), subtract));
    hn::Store(weight, d, s + key);
    sum = hn::Add(sum, weight);
  }
  state.row_sum[r] = state.row_sum[r] * hn::GetLane(rescale) + hn::GetLane(hn::SumOfLanes(d, sum));
  if (state.row_max[r] == new_max) return;
  state.row_max[r] = new_max;
  for (std::int64_t i = 0; i < head_dim; i += lanes) {
    float* o = state.o + r * head_dim + i;
    hn::Store(hn::Mul(hn::Load(d, o), rescale), d, o);
  }
}

template <int kR, class D, class T>
HWY_NOINLINE void few_rows_step(D d, const Call& call, const FewKeysBlock<T>& block, FewRows& state, SkipCount& count) {
  const std::int64_t head_dim = call.input.q.head_dim;
  const auto lanes = static_cast<std::int32_t>(hn::Lanes(d));
  score_keys<kR>(d, block, head_dim, state);
  const std::int32_t padded = (block.num_keys + lanes - 1) / lanes * lanes;
  float most[kR];
  bool negligible = true;
  for (int r = 0; r < kR; ++r) {
    float* HWY_RESTRICT s = state.scores + r * kFewKeys;
    const std::int32_t seen =
        block.may_hide ? std::clamp(state.limit[r] - block.first_key, 0, block.num_keys) : block.num_keys;
    std::fill(s + seen, s + padded, -std::numeric_limits<float>::infinity());
    auto largest = hn::Load(d, s);
    for (std::int32_t key = lanes; key < padded; key += lanes) largest = hn::Max(largest, hn::Load(d, s + key));
    most[r] = hn::GetLane(hn::MaxOfLanes(d, largest)) + block.bias;
    negligible = negligible && most[r] - state.row_max[r] < call.log2_lambda;
  }
  ++count.steps;
  if (negligible) {
    ++count.skipped;
    return;
  }
  for (int r = 0; r < kR; ++r) soften_row(d, head_dim, padded, most[r], block.bias, r, state);
  constexpr int kC = std::min(8, kAccumulators / kR);
  std::int64_t i = 0;
  for (; i + kC * lanes <= head_dim; i += kC * lanes) mix_vectors<kR, kC>(d, block, head_dim, i, state);
  for (; i < head_dim; i += lanes) mix_vectors<kR, 1>(d, block, head_dim, i, state);
}

// Vectors divide D: 16 lanes where D is a multiple of 16, else 8.
template <class T>
void few_rows_step_of_shape(const Call& call, std::int64_t rows, const FewKeysBlock<T>& block, FewRows& state,
                            SkipCount& count) {
  const auto with_vectors = [&](auto d) {
    if (rows <= 1) return few_rows_step<1>(d, call, block, state, count);
    if (rows <= 2) return few_rows_step<2>(d, call, block, state, count);
    if (rows <= 4) return few_rows_step<4>(d, call, block, state, count);
    few_rows_step<8>(d, call, block, state, count);
  };
  if (call.input.q.head_dim % 16 == 0) return with_vectors(hn::CappedTag<float, 16>());
  with_vectors(hn::CappedTag<float, 8>());
}

template <class T>
void walk_list(const Call& call, const Item& item, FewRows& state, SkipCount& count) {
  const AttentionUnit& unit = call.input.units[static_cast<std::size_t>(item.unit)];
  const PagedKvView& kv = call.input.kv;
  FewKeysBlock<T> block;
  std::int32_t entry = unit.list_begin + item.first_key / kv.page_tokens;
  std::int32_t token = item.first_key % kv.page_tokens;
  for (block.first_key = item.first_key; block.first_key < item.end_key; block.first_key += kFewKeys) {
    block.num_keys = std::min(item.end_key - block.first_key, kFewKeys);
    for (std::int32_t key = 0; key < block.num_keys; ++key) {
      const std::int64_t offset = kv.offset(call.input.page_ids[static_cast<std::size_t>(entry)], token, unit.kv_head);
      block.k_rows[key] = static_cast<const T*>(kv.k) + offset;
      block.v_rows[key] = static_cast<const T*>(kv.v) + offset;
      if (++token == kv.page_tokens) {
        token = 0;
        ++entry;
      }
    }
    few_rows_step_of_shape(call, item.num_rows, block, state, count);
  }
}

void walk_means(const Call& call, const Item& item, FewRows& state, SkipCount& count) {
  const MeanCorrection& correction = call.input.correction;
  const std::int32_t kv_head = call.input.units[static_cast<std::size_t>(item.unit)].kv_head;
  const DroppedPages dropped = correction.dropped[static_cast<std::size_t>(item.unit)];
  FewKeysBlock<float> block;
  block.bias = call.log2_page_tokens;
  block.may_hide = false;
  for (std::int32_t first = 0; first < dropped.count; first += kFewKeys) {
    block.num_keys = std::min(dropped.count - first, kFewKeys);
    for (std::int32_t key = 0; key < block.num_keys; ++key) {
      const std::int64_t page = correction.dropped_ids[static_cast<std::size_t>(dropped.begin + first + key)];
      const std::int64_t at = (page * call.input.kv.num_kv_heads + kv_head) * call.input.kv.head_dim;
      block.k_rows[key] = correction.mean_k + at;
      block.v_rows[key] = correction.mean_v + at;
    }
    few_rows_step_of_shape(call, item.num_rows, block, state, count);
  }
}

std::int64_t scratch_bytes(const Call& call) {
  return kFewRows * (2 * std::int64_t{call.input.q.head_dim} + kFewKeys) * static_cast<std::int64_t>(sizeof(float));
}

void attend(const Call& call, const Item& item, std::byte* scratch, SkipCount& count) {
  const AttentionUnit& unit = call.input.units[static_cast<std::size_t>(item.unit)];
  const std::int64_t head_dim = call.input.q.head_dim;
  const std::int32_t heads = call.input.heads_per_unit;
  FewRows state;
  state.scores = reinterpret_cast<float*>(scratch);
  state.q = state.scores + kFewRows * kFewKeys;
  state.o = state.q + kFewRows * head_dim;
  std::fill_n(state.q, 2 * kFewRows * head_dim, 0.0F);
  const float scale = static_cast<float>(double{call.input.softmax_scale} * std::numbers::log2e);
  for (std::int64_t r = 0; r < kFewRows; ++r) {
    const std::int64_t token = r / heads;
    // Padding sees nothing, and is never nearer to its maximum than a real row.
    const bool real = r < item.num_rows;
    const std::int64_t sees = std::int64_t{unit.past_tokens} + unit.causal_shift + token + 1;
    state.limit[r] = real ? static_cast<std::int32_t>(std::min<std::int64_t>(sees, unit.list_tokens)) : 0;
    state.row_max[r] = real ? std::numeric_limits<float>::lowest() : std::numeric_limits<float>::max();
    state.row_sum[r] = 0;
    if (!real) continue;
    const float* q = call.input.q.row(unit.q_begin + static_cast<std::int32_t>(token),
                                      unit.q_head + static_cast<std::int32_t>(r % heads));
    for (std::int64_t i = 0; i < head_dim; ++i) state.q[r * head_dim + i] = q[i] * scale;
  }

  if (call.input.kv.dtype == DType::kF32) {
    walk_list<float>(call, item, state, count);
  } else {
    walk_list<Bf16>(call, item, state, count);
  }
  if (item.last_keys && !call.input.correction.dropped.empty()) walk_means(call, item, state, count);

  for (std::int64_t r = 0; r < item.num_rows; ++r) {
    const std::int32_t token = unit.q_begin + static_cast<std::int32_t>(r / heads);
    const std::int32_t head = unit.q_head + static_cast<std::int32_t>(r % heads);
    const float sum = state.row_sum[r];
    const float inverse = sum == 0 ? 0.0F : 1.0F / sum;
    float* o = item.partial < 0 ? call.output.o.row(token, head) : call.partial_o + (item.partial + r) * head_dim;
    for (std::int64_t i = 0; i < head_dim; ++i) o[i] = state.o[r * head_dim + i] * inverse;
    float* lse = item.partial >= 0            ? call.partial_lse + item.partial + r
                 : call.output.lse == nullptr ? nullptr
                                              : call.output.lse + std::int64_t{token} * call.input.q.heads + head;
    if (lse == nullptr) continue;
    *lse = sum == 0 ? -std::numeric_limits<float>::infinity()
                    : static_cast<float>(double{state.row_max[r]} * std::numbers::ln2 + std::log(double{sum}));
  }
}

}  // namespace

Kernel few_rows_kernel_of_target() { return {.scratch_bytes = scratch_bytes, .attend = attend}; }

}  // namespace HWY_NAMESPACE
}  // namespace compact::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace compact::cpu {
HWY_EXPORT(few_rows_kernel_of_target);
Kernel few_rows_kernel() { return HWY_DYNAMIC_DISPATCH(few_rows_kernel_of_target)(); }
}  // namespace compact::cpu
#endif
