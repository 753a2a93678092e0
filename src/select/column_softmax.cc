// See column_softmax.h.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/select/column_softmax.cc"
// Register blocks are arrays of vectors, which vectors of unknown length do not allow; such machines take NEON.
#ifndef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#endif
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "src/core/fast_exp2-inl.h"
#include "src/select/column_batch.h"

#ifdef __clang__
#define CA_UNROLL _Pragma("clang loop unroll(full)")
#else
#define CA_UNROLL _Pragma("GCC unroll 16")
#endif

HWY_BEFORE_NAMESPACE();
namespace compact {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::CappedTag<float, kRowGroup>;
using V = hn::Vec<D>;

// Registers: 4 x 6 accumulators + 4 + 1 of 32, or 2 x 6 + 2 + 1 of 16.
constexpr int kMaxVecs = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM ? 4 : 2;

// Scores of kVecs vectors of rows from r0 on with the columns [c0, c0 + kColumnBlock), their row maxima and non-finite
// flags.
template <int kVecs>
HWY_INLINE void score_block(const ColumnBatch& batch, std::int32_t r0, std::int32_t c0) {
  const D d;
  const auto lanes = static_cast<std::int32_t>(hn::Lanes(d));
  const float* const* columns = batch.columns + c0;
  const float* queries = batch.queries + r0;
  V acc[kColumnBlock][kVecs];
  CA_UNROLL
  for (int c = 0; c < kColumnBlock; ++c) {
    CA_UNROLL
    for (int v = 0; v < kVecs; ++v) acc[c][v] = hn::Zero(d);
  }
  const float* k0 = columns[0];
  const float* k1 = columns[1];
  const float* k2 = columns[2];
  const float* k3 = columns[3];
  const float* k4 = columns[4];
  const float* k5 = columns[5];
  static_assert(kColumnBlock == 6);
  for (std::int32_t x = 0; x < batch.depth; ++x, queries += batch.padded_rows) {
    V q[kVecs];
    CA_UNROLL
    for (int v = 0; v < kVecs; ++v) q[v] = hn::Load(d, queries + v * lanes);
    const float k[kColumnBlock] = {k0[x], k1[x], k2[x], k3[x], k4[x], k5[x]};
    CA_UNROLL
    for (int c = 0; c < kColumnBlock; ++c) {
      const V key = hn::Set(d, k[c]);
      CA_UNROLL
      for (int v = 0; v < kVecs; ++v) acc[c][v] = hn::MulAdd(q[v], key, acc[c][v]);
    }
  }

  if (c0 + kColumnBlock > batch.min_visible) {
    // Only near the end: columns that some rows do not see, and the repeats that fill the block.
    const V minus_inf = hn::Set(d, -kInfinity);
    for (int v = 0; v < kVecs; ++v) {
      const V visible = hn::Load(d, batch.visible + r0 + v * lanes);
      CA_UNROLL
      for (int c = 0; c < kColumnBlock; ++c) {
        const auto seen = hn::Lt(hn::Set(d, static_cast<float>(c0 + c)), visible);
        acc[c][v] = hn::IfThenElse(seen, acc[c][v], minus_inf);
      }
    }
  }

  const V inf = hn::Set(d, kInfinity);
  CA_UNROLL
  for (int v = 0; v < kVecs; ++v) {
    float* row_max = batch.row_max + r0 + v * lanes;
    float* row_bad = batch.row_bad + r0 + v * lanes;
    V largest = hn::Load(d, row_max);
    V bad = hn::Load(d, row_bad);
    CA_UNROLL
    for (int c = 0; c < kColumnBlock; ++c) {
      largest = hn::Max(largest, acc[c][v]);
      bad = hn::IfThenElse(hn::Lt(acc[c][v], inf), bad, inf);  // neither NaN nor +inf is less
      hn::Store(acc[c][v], d, batch.panel + std::int64_t{c0 + c} * batch.padded_rows + r0 + v * lanes);
    }
    hn::Store(largest, d, row_max);
    hn::Store(bad, d, row_bad);
  }
}

// Largest scores of the groups for kVecs vectors of rows from r0 on.
template <int kVecs>
HWY_INLINE void max_block(const ColumnBatch& batch, std::int32_t r0) {
  const D d;
  const auto lanes = static_cast<std::int32_t>(hn::Lanes(d));
  for (std::int32_t c = 0, g = 0; c < batch.num_columns; ++g) {
    const std::int32_t end = c + batch.group_columns < batch.num_columns ? c + batch.group_columns : batch.num_columns;
    V largest[kVecs];
    CA_UNROLL
    for (int v = 0; v < kVecs; ++v) largest[v] = hn::Set(d, -kInfinity);
    for (; c < end; ++c) {
      const float* scores = batch.panel + std::int64_t{c} * batch.padded_rows + r0;
      CA_UNROLL
      for (int v = 0; v < kVecs; ++v) largest[v] = hn::Max(largest[v], hn::Load(d, scores + v * lanes));
    }
    CA_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      hn::Store(largest[v], d, batch.sums + std::int64_t{g} * batch.padded_rows + r0 + v * lanes);
    }
  }
}

// Exponentials of kVecs vectors of rows from r0 on, summed over each group, columns ascending.
template <int kVecs>
HWY_INLINE void sum_block(const ColumnBatch& batch, std::int32_t r0) {
  const D d;
  const auto lanes = static_cast<std::int32_t>(hn::Lanes(d));
  V shift[kVecs];
  CA_UNROLL
  for (int v = 0; v < kVecs; ++v) {
    // Finite even for a row that sees nothing: -inf minus it is -inf, whose exponential is 0.
    const V largest = hn::Max(hn::Load(d, batch.row_max + r0 + v * lanes), hn::Set(d, kLowest));
    hn::Store(largest, d, batch.shift + r0 + v * lanes);
    shift[v] = largest;
  }
  for (std::int32_t c = 0, g = 0; c < batch.num_columns; ++g) {
    const std::int32_t end = c + batch.group_columns < batch.num_columns ? c + batch.group_columns : batch.num_columns;
    V sum[kVecs];
    CA_UNROLL
    for (int v = 0; v < kVecs; ++v) sum[v] = hn::Zero(d);
    for (; c < end; ++c) {
      const float* scores = batch.panel + std::int64_t{c} * batch.padded_rows + r0;
      CA_UNROLL
      for (int v = 0; v < kVecs; ++v) {
        sum[v] = hn::Add(sum[v], fast_exp2(d, hn::Sub(hn::Load(d, scores + v * lanes), shift[v])));
      }
    }
    CA_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      hn::Store(sum[v], d, batch.sums + std::int64_t{g} * batch.padded_rows + r0 + v * lanes);
    }
  }
}

template <int kVecs>
HWY_INLINE void run_rows(const ColumnBatch& batch, std::int32_t r0) {
  for (std::int32_t c = 0; c < batch.num_columns; c += kColumnBlock) score_block<kVecs>(batch, r0, c);
  if (batch.maxima) {
    max_block<kVecs>(batch, r0);
  } else {
    sum_block<kVecs>(batch, r0);
  }
}

void run_batch(const ColumnBatch& batch) {
  const auto lanes = static_cast<std::int32_t>(hn::Lanes(D()));
  std::int32_t r0 = 0;
  for (; r0 + kMaxVecs * lanes <= batch.padded_rows; r0 += kMaxVecs * lanes) run_rows<kMaxVecs>(batch, r0);
  for (; r0 + 2 * lanes <= batch.padded_rows; r0 += 2 * lanes) run_rows<2>(batch, r0);
  for (; r0 < batch.padded_rows; r0 += lanes) run_rows<1>(batch, r0);
}

// factor[r] = scale[r] * 2^(shift[r] - reference[r]); scale null: 1.
void make_factors(const float* shift, const float* reference, const float* scale, std::int32_t padded_rows,
                  float* factor) {
  const D d;
  const auto lanes = static_cast<std::int32_t>(hn::Lanes(d));
  for (std::int32_t r = 0; r < padded_rows; r += lanes) {
    const V exponent = hn::Min(hn::Sub(hn::Load(d, shift + r), hn::LoadU(d, reference + r)), hn::Set(d, 127.0F));
    const V power = fast_exp2(d, exponent);
    hn::Store(scale == nullptr ? power : hn::Mul(hn::LoadU(d, scale + r), power), d, factor + r);
  }
}

void add_to_totals(const RowJoin& join, float* totals) {
  const D d;
  const auto lanes = static_cast<std::int32_t>(hn::Lanes(d));
  for (std::int32_t r = 0; r < join.padded_rows; r += lanes) {
    V sum = hn::Zero(d);
    for (std::int32_t g = 0; g < join.num_groups; ++g) {
      sum = hn::Add(sum, hn::Load(d, join.sums + std::int64_t{g} * join.padded_rows + r));
    }
    hn::StoreU(hn::MulAdd(hn::Load(d, join.factor + r), sum, hn::LoadU(d, totals + r)), d, totals + r);
  }
}

// Sixteen partial results joined in a fixed tree, whatever the vector length.
void join_groups(const RowJoin& join, float* sum, float* max) {
  const D d;
  const auto lanes = static_cast<std::int32_t>(hn::Lanes(d));
  const V zero = hn::Zero(d);
  const V cap = hn::Set(d, join.cap);
  HWY_ALIGN float partial_sum[kRowGroup];
  HWY_ALIGN float partial_max[kRowGroup];
  for (std::int32_t g = 0; g < join.num_groups; ++g) {
    const float* sums = join.sums + std::int64_t{g} * join.padded_rows;
    for (std::int32_t lane = 0; lane < kRowGroup; lane += lanes) {
      V total = zero;
      V largest = zero;
      for (std::int32_t r = lane; r < join.padded_rows; r += kRowGroup) {
        const V weight = hn::LoadU(d, join.weight + r);
        const V part = hn::Min(hn::Mul(hn::Load(d, join.factor + r), hn::Load(d, sums + r)), cap);
        const V voting = hn::IfThenElseZero(hn::Gt(weight, zero), part);
        total = hn::MulAdd(weight, voting, total);
        largest = hn::Max(largest, voting);
      }
      hn::Store(total, d, partial_sum + lane);
      hn::Store(largest, d, partial_max + lane);
    }
    for (std::int32_t half = kRowGroup / 2; half > 0; half /= 2) {
      for (std::int32_t lane = 0; lane < half; ++lane) {
        partial_sum[lane] += partial_sum[lane + half];
        partial_max[lane] = partial_max[lane] > partial_max[lane + half] ? partial_max[lane] : partial_max[lane + half];
      }
    }
    if (sum != nullptr) sum[g] = partial_sum[0];
    if (max != nullptr) max[g] = partial_max[0];
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace compact
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include <algorithm>
#include <utility>

#include "src/select/column_softmax.h"

namespace compact {
namespace {

HWY_EXPORT(run_batch);
HWY_EXPORT(make_factors);
HWY_EXPORT(add_to_totals);
HWY_EXPORT(join_groups);

// Columns of a batch unless one group has more: a panel of 128 rows takes 48 KB.
constexpr std::int32_t kBatchColumns = 96;

std::int32_t round_up(std::int32_t value, std::int32_t step) { return (value + step - 1) / step * step; }

std::int32_t batch_columns(std::int32_t group_columns) {
  return std::max(1, kBatchColumns / group_columns) * group_columns;
}

}  // namespace

bool TileSoftmax::reserve(std::int32_t max_rows, std::int32_t max_depth, std::int32_t max_groups,
                          std::int32_t max_group_columns) {
  const std::int64_t padded_rows = round_up(std::max(1, max_rows), kRowGroup);
  const std::int64_t panel_columns = round_up(std::max(kBatchColumns, batch_columns(max_group_columns)), kColumnBlock);
  const std::int64_t floats = padded_rows * (max_depth + panel_columns + 2 * std::int64_t{max_groups} + 5);
  memory_ = hwy::AllocateAligned<float>(static_cast<std::size_t>(floats));
  if (memory_ == nullptr) return false;
  float* next = memory_.get();
  const auto take = [&](std::int64_t width) { return std::exchange(next, next + width * padded_rows); };
  queries_ = take(max_depth);
  panel_ = take(panel_columns);
  sums_ = take(max_groups);
  shifts_ = take(max_groups);  // a batch has one group at least; memory that is not touched costs nothing
  row_max_ = take(1);
  row_bad_ = take(1);
  visible_ = take(1);
  seen_ = take(1);
  factor_ = take(1);
  return true;
}

void TileSoftmax::begin(std::int32_t rows, std::int32_t depth) {
  rows_ = rows;
  padded_rows_ = round_up(rows, kRowGroup);
  depth_ = depth;
  num_groups_ = 0;
  batches_.clear();
  std::fill_n(row_max_, padded_rows_, -kInfinity);
  std::fill_n(row_bad_, padded_rows_, 0.0F);
  std::fill_n(seen_, padded_rows_, 0.0F);
}

void TileSoftmax::load_queries(std::span<const float* const> rows, float scale) {
  for (std::int32_t r0 = 0; r0 < padded_rows_; r0 += kRowGroup) {
    const float* group[kRowGroup];
    const std::int32_t count = std::min(kRowGroup, rows_ - r0);
    for (std::int32_t i = 0; i < count; ++i) group[i] = rows[static_cast<std::size_t>(r0 + i)];
    float* out = queries_ + r0;
    for (std::int32_t x = 0; x < depth_; ++x, out += padded_rows_) {
      if (count == kRowGroup) {  // the usual case, without a test in the loop
        for (std::int32_t i = 0; i < kRowGroup; ++i) out[i] = group[i][x] * scale;
      } else {
        for (std::int32_t i = 0; i < kRowGroup; ++i) out[i] = i < count ? group[i][x] * scale : 0.0F;
      }
    }
  }
}

void TileSoftmax::add(std::span<const float* const> columns, std::int32_t group_columns, const std::int32_t* visible,
                      bool maxima) {
  const auto num_columns = static_cast<std::int32_t>(columns.size());
  if (num_columns == 0) return;
  columns_.assign(columns.begin(), columns.end());
  columns_.resize(columns.size() + kColumnBlock, columns.back());  // a register block may read past the last batch
  const std::int32_t step = batch_columns(group_columns);
  for (std::int32_t first = 0; first < num_columns; first += step) {
    add_batch(first, std::min(step, num_columns - first), group_columns, visible, maxima);
  }
  for (std::int32_t r = 0; r < rows_; ++r)
    seen_[r] += static_cast<float>(visible == nullptr ? num_columns : visible[r]);
}

void TileSoftmax::add_batch(std::int32_t first_column, std::int32_t num_columns, std::int32_t group_columns,
                            const std::int32_t* visible, bool maxima) {
  std::int32_t min_visible = num_columns;
  std::fill_n(visible_, padded_rows_, static_cast<float>(num_columns));  // counts below 2^24: exact
  if (visible != nullptr) {
    for (std::int32_t r = 0; r < rows_; ++r) {
      const std::int32_t seen = std::clamp(visible[r] - first_column, 0, num_columns);
      visible_[r] = static_cast<float>(seen);
      min_visible = std::min(min_visible, seen);
    }
  }
  const Batch batch{num_groups_, num_groups_ + (num_columns + group_columns - 1) / group_columns};
  HWY_DYNAMIC_DISPATCH(run_batch)
  ({.depth = depth_,
    .num_columns = num_columns,
    .group_columns = group_columns,
    .padded_rows = padded_rows_,
    .min_visible = min_visible,
    .maxima = maxima,
    .columns = columns_.data() + first_column,
    .queries = queries_,
    .visible = visible_,
    .panel = panel_,
    .row_max = row_max_,
    .row_bad = row_bad_,
    .shift = shifts_ + static_cast<std::int64_t>(batches_.size()) * padded_rows_,
    .sums = sums_ + std::int64_t{batch.first_group} * padded_rows_});
  num_groups_ = batch.end_group;
  batches_.push_back(batch);
}

std::int32_t TileSoftmax::nonfinite_rows() const noexcept {
  std::int32_t count = 0;
  for (std::int32_t r = 0; r < rows_; ++r) count += finite(r) ? 0 : 1;
  return count;
}

std::int32_t TileSoftmax::num_seeing_rows() const noexcept {
  std::int32_t count = 0;
  for (std::int32_t r = 0; r < rows_; ++r) count += sees(r) ? 1 : 0;
  return count;
}

void TileSoftmax::max_over_rows(std::int32_t first, std::int32_t end, std::int32_t begin_row, std::int32_t end_row,
                                float* max) const {
  for (std::int32_t g = first; g < end; ++g) {
    const float* scores = sums_ + std::int64_t{g} * padded_rows_;
    max[g - first] = *std::max_element(scores + begin_row, scores + end_row);
  }
}

template <class Visit>
void TileSoftmax::for_each_part(std::int32_t first, std::int32_t end, const float* reference, const float* scale,
                                Visit visit) {
  for (std::size_t b = 0; b < batches_.size(); ++b) {
    const std::int32_t from = std::max(first, batches_[b].first_group);
    const std::int32_t to = std::min(end, batches_[b].end_group);
    if (from >= to) continue;
    const float* shift = shifts_ + static_cast<std::int64_t>(b) * padded_rows_;
    HWY_DYNAMIC_DISPATCH(make_factors)(shift, reference, scale, padded_rows_, factor_);
    visit(from, RowJoin{.num_groups = to - from,
                        .padded_rows = padded_rows_,
                        .sums = sums_ + std::int64_t{from} * padded_rows_,
                        .factor = factor_});
  }
}

void TileSoftmax::total_rows(std::int32_t first, std::int32_t end, const float* reference, float* totals) {
  std::fill_n(totals, padded_rows_, 0.0F);
  for_each_part(first, end, reference, nullptr, [&](std::int32_t, const RowJoin& join) {
    HWY_DYNAMIC_DISPATCH(add_to_totals)(join, totals);
  });
}

void TileSoftmax::join_rows(std::int32_t first, std::int32_t end, const float* reference, const float* scale,
                            const float* weight, float cap, float* sum, float* max) {
  for_each_part(first, end, reference, scale, [&](std::int32_t from, RowJoin join) {
    join.weight = weight;
    join.cap = cap;
    HWY_DYNAMIC_DISPATCH(join_groups)
    (join, sum == nullptr ? nullptr : sum + (from - first), max == nullptr ? nullptr : max + (from - first));
  });
}

}  // namespace compact

#endif  // HWY_ONCE
