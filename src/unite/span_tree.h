/// Mode `adaptive`: which neighbouring spans to merge, exactly, on a fixed binary tree (docs/design/method.md 5.4).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "compact/block_union.h"
#include "src/unite/spans.h"

namespace compact {

/// The leaves of one (chunk, KV head or sub-group), ascending, with absolute index floor(position / leaf tokens).
struct SpanTreeInput {
  std::span<const QuerySpan> leaves;
  const std::uint64_t* words = nullptr;  // [leaves, words_per_row]  union of each leaf
  const std::int64_t* wanted = nullptr;  // [leaves]  rows * pages wanted before the union
  std::int32_t words_per_row = 0;
  std::int32_t heads_per_unit = 1;
  std::int32_t chunk_pages = 0;  // pages that every unit of the chunk lists besides its past pages
  std::int32_t page_tokens = 0;
  std::int32_t max_inflation_1024ths = 0;
  CostModel cost{};
};

struct SpanTreeResult {
  std::vector<std::int32_t> unit_ends;  // one past the last leaf of each unit, ascending
  std::int64_t cost = 0;
};

/// A node of level l holds the leaves of equal index >> l; it becomes one unit if that costs no more than its two
/// halves. Tree edges are absolute, so the same tokens meet in any chunking.
[[nodiscard]] SpanTreeResult merge_spans(const SpanTreeInput& input);

}  // namespace compact
