/// Query spans of a step: runs of tokens of one chunk, cut at absolute multiples of their length.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "compact/block_union.h"
#include "compact/selector.h"
#include "compact/tensor_view.h"
#include "src/core/host_device.h"

namespace compact {

/// Packed query rows of an M-tile, and list tokens of a tile step.
inline constexpr std::int32_t kTileRows = 128;

/// Tokens of a span that fills one M-tile: 128 / hpt, hpt = largest power of two that divides heads_per_unit.
[[nodiscard]] CA_HOST_DEVICE constexpr std::int32_t tile_span_tokens(std::int32_t heads_per_unit) noexcept {
  const std::int32_t heads_per_tile = heads_per_unit & -heads_per_unit;
  return heads_per_tile < kTileRows ? kTileRows / heads_per_tile : 1;
}

/// Length of the mode's spans (kAdaptive: of its leaves); 0: the whole chunk.
[[nodiscard]] std::int32_t span_tokens_of(const UnionOptions& options, std::int32_t heads_per_unit) noexcept;

struct QuerySpan {
  std::int32_t index = 0;        // floor(position / span tokens), absolute
  std::int32_t offset = 0;       // of its first token in the chunk
  std::int32_t tokens = 0;       // 1 or more
  std::int32_t first_block = 0;  // query blocks of the mask that meet the span: [first_block, end_block)
  std::int32_t end_block = 0;
};

/// The chunk's spans, ascending. span_tokens 0: one span, the whole chunk. `blocks` are the query blocks of the step,
/// in which the chunk's begin at first_block.
[[nodiscard]] std::vector<QuerySpan> make_spans(const ChunkView& chunk, std::int32_t span_tokens,
                                                std::span<const QueryBlock> blocks, std::int32_t first_block);

}  // namespace compact
