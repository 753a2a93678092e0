// What both selection kernels know of a tile: 128 packed rows (128/G tokens x G heads) of one KV head against all its
// scored pages.
//
// A page is wanted iff some row's score reaches that row's cut = log-sum-exp over all pages + log(share): known only
// after the last page, and 128 rows x 1024 pages of scores do not fit an SM. But the sum only grows from page to page:
// a score below the running cut, that of the pages seen so far, never reaches the final one. What is above it is judged
// again at the end by the same score, so the bits do not depend on how much that was. Which scores are kept, or which
// pages are scored again: the kernels differ (docs/design/step-kernels.md).
#pragma once

#include <cstdint>

#include "src/core/count_bits.h"
#include "src/select/cuda/launch.h"

namespace compact {

constexpr std::int32_t kMeanKeyRows = 128;   // packed rows of a tile
constexpr std::int32_t kMeanKeyPages = 64;   // of a stage
constexpr float kCutSlackLog2 = 1.0f / 512;  // rounding of the running cut

// A tile's place in the step, in shared memory: registers are full.
struct MeanKeyTile {
  const std::int32_t* table;  // [Kb]
  std::uint64_t* mask_row;    // [words_per_row]
  std::int32_t q_begin;
  std::int32_t kv_head;
  std::int32_t rows;        // tokens x G; 0: nothing to do
  std::int32_t past_pages;  // Np
  std::int32_t end;         // pages [0, end) end at or before the block's first token
  float share;              // of the tile's KV head; 0 or less: all pages
  float candidate_margin;   // log2 of the least threshold, minus the slack

  __device__ __forceinline__ std::int32_t num_stages() const { return (end + kMeanKeyPages - 1) / kMeanKeyPages; }
  // The threshold of the row rule once it is known how many pages have a mean.
  __device__ __forceinline__ float threshold(const MeanKeyArgs& args, std::int32_t num_scored) const {
    return fmaxf(share, args.lift / static_cast<float>(num_scored));
  }
};

// The tile of a block and a KV head.
__device__ __forceinline__ MeanKeyTile make_tile(const MeanKeyArgs& args, const QueryBlock& block,
                                                 const StepChunk& chunk, std::int32_t block_idx, std::int32_t kv_head) {
  MeanKeyTile tile;
  tile.table = args.page_tables + chunk.table_row * args.page_table_stride;
  tile.q_begin = block.q_begin;
  tile.kv_head = kv_head;
  tile.mask_row = args.mask + (std::int64_t{tile.kv_head} * args.max_blocks + block_idx) * args.words_per_row;
  tile.rows = chunk.is_short != 0 ? 0 : block.tokens * args.group;
  tile.past_pages = chunk.chunk_start / args.page_tokens;
  tile.end = block.first_position / args.page_tokens;
  tile.share = args.head_shares == nullptr ? args.share : args.head_shares[kv_head];
  tile.candidate_margin = log2f(tile.threshold(args, tile.end)) - kCutSlackLog2;
  return tile;
}
__device__ __forceinline__ MeanKeyTile find_tile(const MeanKeyArgs& args, std::int32_t block_idx,
                                                 std::int32_t kv_head) {
  const QueryBlock block = args.tables.blocks[block_idx];
  return make_tile(args, block, args.tables.chunks[block.chunk], block_idx, kv_head);
}

// Whether page j before the end has a mean: pages before the chunk do, of the chunk's own those that it covers.
__device__ __forceinline__ bool page_has_mean(const MeanKeyArgs& args, const MeanKeyTile& tile, std::int32_t j,
                                              std::int32_t physical_page) {
  return j < tile.past_pages || args.mean_tokens == nullptr || args.mean_tokens[physical_page] == args.page_tokens;
}

// Bits of the 64 pages from `first` on that have a mean: complete pages before the end, and of the chunk's own pages
// those whose mean covers them. All lanes of a warp together.
__device__ __forceinline__ std::uint64_t scored_pages(const MeanKeyArgs& args, const MeanKeyTile& tile,
                                                      std::int32_t first, std::int32_t lane) {
  const auto scored = [&](std::int32_t j) { return j < tile.end && page_has_mean(args, tile, j, tile.table[j]); };
  const std::uint32_t low = __ballot_sync(0xffffffffu, scored(first + lane));
  const std::uint32_t high = __ballot_sync(0xffffffffu, scored(first + 32 + lane));
  return std::uint64_t{high} << 32 | low;
}

// Pages of [first, first + 64) before the end that `scored` lacks.
__device__ __forceinline__ std::int32_t num_unscored(const MeanKeyTile& tile, std::int32_t first,
                                                     std::uint64_t scored) {
  const std::int32_t before_end = tile.end - first;  // below 0: pages that only the other tile of a CTA scores
  return before_end <= 0 ? 0 : (before_end < kMeanKeyPages ? before_end : kMeanKeyPages) - count_bits(scored);
}

}  // namespace compact
