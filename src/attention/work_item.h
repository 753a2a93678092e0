// One piece of work of the CUDA attention kernels: an M-tile (up to BM packed query rows of a unit) against a range of
// KV tiles. Written by the prepare kernel, read by the main kernels with one dependent load. No CUDA types: the
// scheduling is tested on the CPU.
#pragma once

#include <cstdint>

namespace compact {

// A packed row r of an M-tile is token r / heads_per_tile, head r % heads_per_tile. A KV tile is BN consecutive list
// coordinates. Token i of the tile sees list coordinate c iff c < list_tokens and c <= visible_base + i.
struct alignas(64) WorkItem {
  std::int32_t q_row;         // first token row in Q and O
  std::int32_t q_rows_valid;  // tokens of the tile that exist
  std::int32_t q_head;        // first query head of the tile
  std::int32_t kv_head;
  std::int32_t list_begin;    // first entry in page_ids
  std::int32_t list_tokens;   // tokens covered by the list
  std::int32_t visible_base;  // past_tokens + causal_shift + index of the tile's first query in its unit
  std::int32_t tile_begin;    // KV tiles [tile_begin, tile_end); equal: write zeros and -inf
  std::int32_t tile_end;
  std::int32_t first_masked_tile;  // tiles below it are wholly visible to every row
  std::int32_t partial_slot;       // -1: this piece writes the final result
  std::int32_t unit;               // where the item comes from: for tests and debugging
  std::int32_t m_tile;
  std::int32_t reserved[3];
};
static_assert(sizeof(WorkItem) == 64);

}  // namespace compact
