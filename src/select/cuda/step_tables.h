// Where everything of a step lies, on the device: written once per step by the plan kernel (src/unite/cuda), read by
// selection and union of every layer. No CUDA types.
#pragma once

#include <cstdint>

#include "compact/selector.h"
#include "compact/step_cuda.h"
#include "src/core/host_device.h"

namespace compact {

// Host numbers of a step, checked.
struct StepShape {
  std::int32_t num_chunks = 0;
  std::int32_t num_q_tokens = 0;
  std::int32_t max_context_tokens = 0;
  std::int32_t num_table_rows = 0;
  std::int32_t num_pages = 0;
  std::int32_t num_kv_heads = 0;
  std::int32_t group = 1;           // G
  std::int32_t heads_per_unit = 1;  // divides G
  std::int32_t sub_groups = 1;      // Hq / heads_per_unit
  std::int32_t page_tokens = 0;
  std::int32_t mask_heads = 0;    // Hq or Hkv
  std::int32_t block_tokens = 0;  // Bq, a power of two
  std::int32_t span_tokens = 0;   // 0: one span, the whole chunk
  std::int32_t max_blocks = 0;
  std::int32_t max_pairs = 0;
  std::int32_t max_spans = 0;
  std::int32_t words_per_row = 0;
  std::int32_t list_capacity = 0;       // entries of a list
  std::int32_t min_context_tokens = 0;  // below: all pages, without selection
};

// A chunk and the places of its query blocks and spans. A chunk with a mistake has no tokens; its places stay empty.
struct StepChunk {
  std::int32_t q_begin = 0;
  std::int32_t chunk_tokens = 0;
  std::int32_t chunk_start = 0;
  std::int32_t table_row = 0;
  std::int32_t first_block = 0;
  std::int32_t first_span = 0;
  std::int32_t num_spans = 0;
  std::int32_t is_short = 0;  // below min_context_tokens
};
static_assert(sizeof(StepChunk) == 32);

// Whether the query blocks of the chunk have pages to choose among.
CA_HOST_DEVICE constexpr bool has_choice(const StepChunk& chunk, std::int32_t page_tokens) {
  return chunk.is_short == 0 && chunk.chunk_tokens > 0 && chunk.chunk_start >= page_tokens;
}

// Two neighbouring query blocks of a chunk, or its last one alone: they want the same mean keys. Everything that a CTA
// wants to know lies here, so that it waits for memory once.
struct BlockPair {
  std::int32_t first_block = 0;
  std::int32_t num_blocks = 0;  // 0: nothing to do
  QueryBlock blocks[2] = {};
  StepChunk chunk;
};

struct StepHeader {
  std::int32_t num_blocks = 0;
  std::int32_t num_pairs = 0;
  std::int32_t num_units = 0;  // places of units, those that a merge leaves empty included
};

struct StepTables {
  StepHeader* header = nullptr;  // [1]
  StepChunk* chunks = nullptr;   // [num_chunks]
  QueryBlock* blocks = nullptr;  // [max_blocks]  tokens 0: nothing to do
  BlockPair* pairs = nullptr;    // [max_pairs]
};

CA_HOST_DEVICE constexpr std::int32_t num_block_pairs(std::int32_t num_blocks) { return (num_blocks + 1) / 2; }

// Runs of positions with equal floor(position / length) that [start, start + tokens) meets; length 0: one run.
CA_HOST_DEVICE constexpr std::int32_t num_runs(std::int32_t start, std::int32_t tokens, std::int32_t length) {
  if (tokens <= 0) return 0;
  return length == 0 ? 1 : (start + tokens - 1) / length - start / length + 1;
}

}  // namespace compact
