/// Exact attention mass of a handful of query rows of one KV head, for whole blocks (page_mass.cc) and for probe rows
/// (sub_mean.cc).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "compact/tensor_view.h"
#include "src/select/column_softmax.h"
#include "src/select/key_rows.h"

namespace compact {

/// A query row and its absolute position: it sees the keys up to there.
struct MassRow {
  const float* q = nullptr;  // [D]
  std::int32_t position = 0;
};

class ExactMassTile {
 public:
  static constexpr std::int32_t kMaxRows = 128;

  explicit ExactMassTile(const PagedKvView& kv) : kv_(kv), keys_(kv) {}
  /// Memory for contexts of up to max_pages pages; false if there is none.
  [[nodiscard]] bool reserve(std::int32_t max_pages) {
    return softmax_.reserve(kMaxRows, kv_.head_dim, max_pages, kv_.page_tokens);
  }

  /// Scores all keys that the rows see, a page at a time; the scores are reduced to one sum per row and page as soon as
  /// they are known, so Q K^T is computed once and never stored whole. rows: at most kMaxRows, positions ascending.
  /// Returns the number of rows with non-finite scores; if there are any, there are no masses.
  [[nodiscard]] std::int32_t run(std::span<const MassRow> rows, const std::int32_t* page_table, std::int32_t kv_head,
                                 float softmax_scale);

  [[nodiscard]] std::int32_t num_pages() const noexcept { return softmax_.num_groups(); }
  /// Masses [num_pages] of the rows with weight above 0: their weighted sum, and their maximum. Either may be null.
  /// weights: [rows of `run`].
  void join(std::span<const float> weights, float* sum, float* max);

 private:
  PagedKvView kv_;
  KeyRows keys_;
  TileSoftmax softmax_;
  std::vector<const float*> queries_;
  std::vector<std::int32_t> visible_;    // [rows]  keys of the page at work that the row sees
  std::vector<float> scales_, weights_;  // [padded rows]  1 / total of the row
};

}  // namespace compact
