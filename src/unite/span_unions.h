/// First stage of the union: what the rows of every query span want (docs/design/method.md 5.1).
#pragma once

#include <cstdint>
#include <vector>

#include "compact/block_union.h"
#include "src/unite/spans.h"
#include "src/unite/union_input.h"

namespace compact {

// A chunk with tokens, its spans, and where its unions lie: [sub-group][span] from first_union on.
struct ChunkPlan {
  std::int32_t chunk = 0;
  std::int32_t past_pages = 0;   // Np
  std::int32_t chunk_pages = 0;  // Kb - Np
  std::vector<QuerySpan> spans{};
  std::int64_t first_union = 0;
};

// Spans of a step and the union of every (chunk, sub-group, span).
struct SpanUnions {
  std::int32_t heads_per_unit = 1;
  std::int32_t sub_groups = 0;  // Hq / heads_per_unit
  std::vector<ChunkPlan> plans;
  std::vector<std::int32_t> plan_of;  // [unions]
  std::vector<std::uint64_t> words;   // [unions, words_per_row]
  std::vector<std::int64_t> wanted;   // [unions]  rows * pages before the union
};

/// Sets the sink and the window of one query block, past pages only (docs/design/method.md section 4).
void add_forced_pages(const UnionInput& input, const QueryBlock& block, std::int32_t past_pages, std::uint64_t* words);

/// Mask rows that stand for the heads [q_head, q_head + heads_per_unit).
struct MaskRows {
  std::int32_t first = 0;
  std::int32_t count = 0;
  std::int32_t heads_per_row = 0;
};
[[nodiscard]] MaskRows mask_rows_of(const UnionInput& input, const BlockMask& mask, std::int32_t q_head,
                                    std::int32_t heads_per_unit);

/// Cuts the chunks into the mode's spans for shape.heads_per_unit heads, ORs the member rows of each and counts.
[[nodiscard]] SpanUnions unite_spans(const UnionInput& input, const BlockMask& mask, const UnionShape& shape,
                                     ThreadPool& pool);

}  // namespace compact
