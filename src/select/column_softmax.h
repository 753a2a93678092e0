/// What the CPU forms of the selectors are made of: query rows against columns (mean keys, keys, strided keys),
/// softmax weights, and their sums over groups of columns (pages).
///
/// Rows lie in lanes: the queries of a tile are transposed once into [depth, rows], so that a vector holds one
/// dimension of 4..16 rows and an element of a column is broadcast. Every score is one chain of fused multiply-adds
/// over ascending dimension, whatever the vector length, the register block or the column's neighbours.
///
/// Columns come in batches of whole groups. A batch's scores stay in a panel of 48 to 132 KB (second-level cache); they
/// become exponentials relative to the running row maximum, and only the sum of each group is kept:
///
///   sums[g, r] = sum over columns c of group g of 2^(score[c, r] - shift[batch(g), r])
///
/// Reductions have a fixed order that depends on neither the chunk's edges nor the thread: same bits for both. SIMD by
/// run-time dispatch (Highway).
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "hwy/aligned_allocator.h"

namespace compact {

class TileSoftmax {
 public:
  /// Memory for tiles of up to these sizes; false if there is none.
  [[nodiscard]] bool reserve(std::int32_t max_rows, std::int32_t max_depth, std::int32_t max_groups,
                             std::int32_t max_group_columns);

  /// A new tile of `rows` query rows of `depth` dimensions.
  void begin(std::int32_t rows, std::int32_t depth);

  /// queries[x, r] = rows[r][x] * scale. Fold log2(e) into the scale: exponentials have base 2.
  void load_queries(std::span<const float* const> rows, float scale);

  /// Appends columns [depth] each, in groups of `group_columns`; the last group may be short.
  /// visible: [rows] columns of this call that the row sees, a prefix; null: all.
  void add_columns(std::span<const float* const> columns, std::int32_t group_columns, const std::int32_t* visible) {
    add(columns, group_columns, visible, false);
  }
  /// The same without exponentials: sums[g, r] is then the largest score of the group. For max_over_rows only; a tile
  /// takes columns one way or the other.
  void add_maxima(std::span<const float* const> columns, std::int32_t group_columns, const std::int32_t* visible) {
    add(columns, group_columns, visible, true);
  }

  [[nodiscard]] std::int32_t num_groups() const noexcept { return num_groups_; }
  [[nodiscard]] std::int32_t padded_rows() const noexcept { return padded_rows_; }
  /// Rows that see columns but have a NaN or +inf score, or -inf only. If there are any, no sum is meaningful.
  [[nodiscard]] std::int32_t nonfinite_rows() const noexcept;
  /// Whether this row is not one of them.
  [[nodiscard]] bool finite(std::int32_t row) const noexcept {
    return !sees(row) || (row_bad_[row] == 0 && row_max_[row] > -std::numeric_limits<float>::infinity());
  }
  /// Whether the row sees a column at all.
  [[nodiscard]] bool sees(std::int32_t row) const noexcept { return seen_[row] > 0; }
  [[nodiscard]] std::int32_t num_seeing_rows() const noexcept;
  /// [rows]  largest score so far, in units of log2; -inf for a row that sees nothing.
  [[nodiscard]] const float* row_max() const noexcept { return row_max_; }
  /// totals[r] = sum over the groups [first, end) of sums * 2^(shift - reference[r]); 0 for a row that sees none of
  /// them. Here and below rows are vectors of padded_rows() elements in any alignment, all of them finite or -inf.
  void total_rows(std::int32_t first, std::int32_t end, const float* reference, float* totals);

  /// With part[g, r] = min(cap, scale[r] * sums[g, r] * 2^(shift[r] - reference[r])), for the groups [first, end):
  ///   sum[g - first] = sum over rows of weight[r] * part[g, r];   max[g - first] = max over rows with weight[r] > 0.
  /// Weight 0 leaves a row out: it must be 0 past the last row. sum or max may be null, and scale: 1.
  void join_rows(std::int32_t first, std::int32_t end, const float* reference, const float* scale, const float* weight,
                 float cap, float* sum, float* max);

  /// After add_maxima: max[g - first] = the largest score of the group over the rows [begin_row, end_row).
  void max_over_rows(std::int32_t first, std::int32_t end, std::int32_t begin_row, std::int32_t end_row,
                     float* max) const;

 private:
  void add(std::span<const float* const> columns, std::int32_t group_columns, const std::int32_t* visible, bool maxima);
  void add_batch(std::int32_t first_column, std::int32_t num_columns, std::int32_t group_columns,
                 const std::int32_t* visible, bool maxima);

  // Calls visit(first group, join) for the part of every batch in [first, end).
  template <class Visit>
  void for_each_part(std::int32_t first, std::int32_t end, const float* reference, const float* scale, Visit visit);

  struct Batch {
    std::int32_t first_group = 0;
    std::int32_t end_group = 0;
  };

  hwy::AlignedFreeUniquePtr<float[]> memory_;
  float* queries_ = nullptr;           // [depth, padded_rows]
  float* panel_ = nullptr;             // [batch columns, padded_rows]  scores, then exponentials
  float* sums_ = nullptr;              // [max_groups, padded_rows]
  float* shifts_ = nullptr;            // [batches, padded_rows]
  float* row_max_ = nullptr;           // [padded_rows]
  float* row_bad_ = nullptr;           // [padded_rows]  > 0 after a NaN or +inf score
  float* visible_ = nullptr;           // [padded_rows]  columns of the batch at work that the row sees
  float* seen_ = nullptr;              // [padded_rows]  columns seen so far
  float* factor_ = nullptr;            // [padded_rows]
  std::vector<const float*> columns_;  // of one call, padded
  std::vector<Batch> batches_;
  std::int32_t rows_ = 0;
  std::int32_t padded_rows_ = 0;
  std::int32_t depth_ = 0;
  std::int32_t num_groups_ = 0;
};

}  // namespace compact
