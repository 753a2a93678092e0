/// Keys of a page divided by their norms, as rows for TileSoftmax: dot products with them are cosines.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "compact/tensor_view.h"
#include "src/select/key_rows.h"

namespace compact {

class UnitKeys {
 public:
  static constexpr float kLeastNorm = 1e-6F;  // a shorter key counts as this long

  explicit UnitKeys(const PagedKvView& kv)
      : keys_(kv), dim_(kv.head_dim), rows_(static_cast<std::size_t>(kv.page_tokens)) {
    staged_.resize(static_cast<std::size_t>(kv.page_tokens) * static_cast<std::size_t>(kv.head_dim));
  }

  /// The first `tokens` keys of a physical page, by the norms in its summary. Valid until the next call.
  [[nodiscard]] std::span<const float* const> load(const PageSummaryView& summaries, std::int32_t page,
                                                   std::int32_t tokens, std::int32_t kv_head) {
    const auto keys = keys_.load(page, 0, tokens, kv_head);
    const float* norms = summaries.norms(page, kv_head);
    for (std::int32_t i = 0; i < tokens; ++i) {
      const float scale = 1.0F / std::max(norms[i], kLeastNorm);
      const float* __restrict key = keys[static_cast<std::size_t>(i)];
      float* __restrict out = staged_.data() + std::int64_t{i} * dim_;
      for (std::int32_t d = 0; d < dim_; ++d) out[d] = key[d] * scale;
      rows_[static_cast<std::size_t>(i)] = out;
    }
    return std::span(rows_).first(static_cast<std::size_t>(tokens));
  }

 private:
  KeyRows keys_;
  std::int32_t dim_;
  std::vector<float> staged_;       // [P, D]
  std::vector<const float*> rows_;  // [P]
};

}  // namespace compact
