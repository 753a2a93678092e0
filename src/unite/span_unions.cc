#include "src/unite/span_unions.h"

#include <algorithm>
#include <bit>

#include "src/core/bit_words.h"

namespace compact {

void add_forced_pages(const UnionInput& input, const QueryBlock& block, std::int32_t past_pages, std::uint64_t* words) {
  const ForcedRanges ranges = forced_ranges(input.forced, block, input.page_tokens, past_pages);
  set_bits(words, 0, ranges.sink_end);
  set_bits(words, ranges.window_begin, ranges.window_end);
}

MaskRows mask_rows_of(const UnionInput& input, const BlockMask& mask, std::int32_t q_head,
                      std::int32_t heads_per_unit) {
  if (mask.mask_heads == input.num_q_heads) return {q_head, heads_per_unit, 1};
  // A packed row is inherited by every sub-group of its KV head and stands for all heads of this unit.
  return {q_head / (input.num_q_heads / input.num_kv_heads), 1, heads_per_unit};
}

SpanUnions unite_spans(const UnionInput& input, const BlockMask& mask, const UnionShape& shape, ThreadPool& pool) {
  SpanUnions result;
  result.heads_per_unit = shape.heads_per_unit;
  result.sub_groups = input.num_q_heads / shape.heads_per_unit;
  const std::int32_t span_tokens = span_tokens_of(input.options, shape.heads_per_unit);
  std::int64_t num_unions = 0;
  for (std::int32_t b = 0, block = 0; b < static_cast<std::int32_t>(input.chunks.size()); ++b) {
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(b)];
    if (chunk.chunk_tokens == 0) continue;
    ChunkPlan plan{.chunk = b, .past_pages = chunk.num_past_pages(input.page_tokens), .first_union = num_unions};
    plan.chunk_pages = chunk.num_pages(input.page_tokens) - plan.past_pages;
    plan.spans = make_spans(chunk, span_tokens, mask.blocks, block);
    block = plan.spans.back().end_block;
    num_unions += static_cast<std::int64_t>(plan.spans.size()) * result.sub_groups;
    result.plan_of.resize(static_cast<std::size_t>(num_unions), static_cast<std::int32_t>(result.plans.size()));
    result.plans.push_back(std::move(plan));
  }

  const auto words_per_row = static_cast<std::size_t>(mask.words_per_row);
  result.words.resize(static_cast<std::size_t>(num_unions) * words_per_row);
  result.wanted.resize(static_cast<std::size_t>(num_unions));
  std::vector<std::uint64_t> forced(static_cast<std::size_t>(pool.num_threads()) * words_per_row);  // [threads, words]
  const auto unite = [&](std::int64_t u, std::int32_t thread) {
    const ChunkPlan& plan = result.plans[static_cast<std::size_t>(result.plan_of[static_cast<std::size_t>(u)])];
    const std::int64_t local = u - plan.first_union;
    const auto num_spans = static_cast<std::int64_t>(plan.spans.size());
    const QuerySpan& span = plan.spans[static_cast<std::size_t>(local % num_spans)];
    const auto q_head = static_cast<std::int32_t>(local / num_spans) * shape.heads_per_unit;
    const MaskRows rows = mask_rows_of(input, mask, q_head, shape.heads_per_unit);
    const std::int32_t span_position = input.chunks[static_cast<std::size_t>(plan.chunk)].chunk_start + span.offset;
    std::uint64_t* united = result.words.data() + static_cast<std::size_t>(u) * words_per_row;
    std::uint64_t* block_forced = forced.data() + static_cast<std::size_t>(thread) * words_per_row;
    for (std::int32_t i = span.first_block; i < span.end_block; ++i) {
      const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
      const std::int32_t tokens = std::min(block.first_position + block.tokens, span_position + span.tokens) -
                                  std::max(block.first_position, span_position);
      std::fill_n(block_forced, words_per_row, 0);
      add_forced_pages(input, block, plan.past_pages, block_forced);
      std::int64_t pages = 0;
      for (std::int32_t h = rows.first; h < rows.first + rows.count; ++h) {
        const std::uint64_t* row = mask.row(h, i);
        for (std::size_t w = 0; w < words_per_row; ++w) {
          const std::uint64_t word = row[w] | block_forced[w];
          united[w] |= word;
          pages += std::popcount(word);
        }
      }
      result.wanted[static_cast<std::size_t>(u)] += pages * tokens * rows.heads_per_row;
    }
  };
  pool.parallel_for(num_unions, unite);
  return result;
}

}  // namespace compact
