#include "src/unite/spans.h"

#include <algorithm>

namespace compact {

std::int32_t span_tokens_of(const UnionOptions& options, std::int32_t heads_per_unit) noexcept {
  switch (options.mode) {
    case UnionMode::kPaper: return 0;
    case UnionMode::kSpan: return options.span_tokens;
    case UnionMode::kTile:
    case UnionMode::kAdaptive: break;
  }
  return tile_span_tokens(heads_per_unit);
}

std::vector<QuerySpan> make_spans(const ChunkView& chunk, std::int32_t span_tokens, std::span<const QueryBlock> blocks,
                                  std::int32_t first_block) {
  std::vector<QuerySpan> spans;
  for (std::int32_t done = 0, block = first_block; done < chunk.chunk_tokens;) {
    const std::int32_t position = chunk.chunk_start + done;
    QuerySpan span{.offset = done, .tokens = chunk.chunk_tokens - done};
    if (span_tokens > 0) {
      span.index = position / span_tokens;
      span.tokens = std::min(span.tokens, span_tokens - position % span_tokens);
    }
    const auto end_of = [&](std::int32_t i) {
      const QueryBlock& one = blocks[static_cast<std::size_t>(i)];
      return one.first_position + one.tokens;
    };
    span.first_block = block;
    while (end_of(block) < position + span.tokens) ++block;
    span.end_block = block + 1;
    if (end_of(block) == position + span.tokens) ++block;  // else the next span begins in the same block
    done += span.tokens;
    spans.push_back(span);
  }
  return spans;
}

}  // namespace compact
