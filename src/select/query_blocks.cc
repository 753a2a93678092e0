// Query blocks at absolute positions, their forced pages, and the block mask's shape.
#include <algorithm>
#include <utility>

#include "compact/selector.h"
#include "src/core/bit_words.h"
#include "src/select/forced_rule.h"

namespace compact {

std::vector<QueryBlock> make_query_blocks(std::span<const ChunkView> chunks, std::int32_t block_tokens) {
  std::vector<QueryBlock> blocks;
  for (std::size_t b = 0; b < chunks.size(); ++b) {
    const ChunkView& chunk = chunks[b];
    std::int32_t position = chunk.chunk_start;
    while (position < chunk.context_tokens()) {
      // Edges lie at absolute multiples of block_tokens, so that the same tokens meet in any chunking.
      const std::int32_t to_edge = block_tokens - position % block_tokens;
      const std::int32_t tokens = std::min(to_edge, chunk.context_tokens() - position);
      blocks.push_back(
          {static_cast<std::int32_t>(b), chunk.q_begin + (position - chunk.chunk_start), tokens, position});
      position += tokens;
    }
  }
  return blocks;
}

ForcedRanges forced_ranges(const ForcedPages& forced, const QueryBlock& block, std::int32_t page_tokens,
                           std::int32_t past_pages) noexcept {
  return forced_ranges_at(forced, block.first_position, block.tokens, page_tokens, past_pages);
}

void BlockMask::reset(std::int32_t num_mask_heads, std::int32_t page_tokens, std::span<const ChunkView> chunks,
                      std::vector<QueryBlock> query_blocks) {
  std::int32_t max_past_pages = 0;
  for (const ChunkView& chunk : chunks) max_past_pages = std::max(max_past_pages, chunk.num_past_pages(page_tokens));
  mask_heads = num_mask_heads;
  words_per_row = words_for_bits(max_past_pages);
  blocks = std::move(query_blocks);
  words.assign(static_cast<std::size_t>(mask_heads) * blocks.size() * static_cast<std::size_t>(words_per_row), 0);
  nonfinite_rows = 0;
  named_row_tokens = 0;
  kept_row_tokens = 0;
}

}  // namespace compact
