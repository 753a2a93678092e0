// The plan of a step, one group of threads per chunk: one algorithm for the device and for the tests. `Block` supplies
//   index(), size()   this thread and their number
//   sum(x)            sum over the group, 64 bits; a barrier
//   report(p, code)   *p = code if *p is 0
#pragma once

#include "src/select/cuda/step_tables.h"

namespace compact {

struct PlanArgs {
  StepShape shape;
  const CudaChunk* chunks = nullptr;
  const std::int32_t* page_tables = nullptr;
  const std::int32_t* mean_tokens = nullptr;  // or null
  std::int64_t page_table_stride = 0;
  StepTables tables;
  std::int32_t* error = nullptr;
};

CA_HOST_DEVICE constexpr bool chunk_in_bounds(const StepShape& s, const CudaChunk& c) {
  return c.q_begin >= 0 && c.chunk_tokens >= 0 && c.chunk_start >= 0 && c.q_begin <= s.num_q_tokens - c.chunk_tokens &&
         c.chunk_start <= s.max_context_tokens - c.chunk_tokens &&
         (c.chunk_tokens == 0 || (c.table_row >= 0 && c.table_row < s.num_table_rows));
}

CA_HOST_DEVICE constexpr std::int32_t places_left(std::int32_t places, std::int64_t before, std::int32_t wanted) {
  const std::int64_t left = before < places ? places - before : 0;
  return left < wanted ? static_cast<std::int32_t>(left) : wanted;
}

// First error among the chunk's page table entries, as seen by all threads.
template <class Block>
CA_HOST_DEVICE CudaStepError check_pages(Block& block, const PlanArgs& args, const CudaChunk& chunk) {
  const std::int32_t* table = args.page_tables + chunk.table_row * args.page_table_stride;
  const std::int32_t past_pages = chunk.chunk_start / args.shape.page_tokens;
  const std::int32_t num_pages = num_runs(0, chunk.chunk_start + chunk.chunk_tokens, args.shape.page_tokens);
  std::int64_t bad_ids = 0, stale = 0;
  for (std::int32_t j = block.index(); j < num_pages; j += block.size()) {
    const std::int32_t page = table[j];
    if (page < 0 || page >= args.shape.num_pages) {
      ++bad_ids;
    } else if (j < past_pages && args.mean_tokens != nullptr && args.mean_tokens[page] != args.shape.page_tokens) {
      ++stale;
    }
  }
  bad_ids = block.sum(bad_ids);
  stale = block.sum(stale);
  return bad_ids > 0 ? CudaStepError::kBadPageId : stale > 0 ? CudaStepError::kStaleMean : CudaStepError::kNone;
}

template <class Block>
CA_HOST_DEVICE void plan_chunk(Block& block, const PlanArgs& args, std::int32_t b) {
  const StepShape& s = args.shape;
  // Chunks out of bounds count as empty everywhere; places of the others follow in order.
  std::int64_t blocks_before = 0, pairs_before = 0, spans_before = 0;
  for (std::int32_t c = block.index(); c < b; c += block.size()) {
    const CudaChunk other = args.chunks[c];
    if (!chunk_in_bounds(s, other)) continue;
    const std::int32_t other_blocks = num_runs(other.chunk_start, other.chunk_tokens, s.block_tokens);
    blocks_before += other_blocks;
    pairs_before += num_block_pairs(other_blocks);
    spans_before += num_runs(other.chunk_start, other.chunk_tokens, s.span_tokens);
  }
  blocks_before = block.sum(blocks_before);
  pairs_before = block.sum(pairs_before);
  spans_before = block.sum(spans_before);

  const CudaChunk chunk = args.chunks[b];
  CudaStepError error = chunk_in_bounds(s, chunk) ? CudaStepError::kNone : CudaStepError::kBadChunk;
  std::int32_t num_blocks = 0, num_pairs = 0, num_spans = 0;
  if (error == CudaStepError::kNone && chunk.chunk_tokens > 0) {
    num_blocks = num_runs(chunk.chunk_start, chunk.chunk_tokens, s.block_tokens);
    num_spans = num_runs(chunk.chunk_start, chunk.chunk_tokens, s.span_tokens);
    num_pairs = places_left(s.max_pairs, pairs_before, num_block_pairs(num_blocks));
    if (blocks_before + num_blocks > s.max_blocks || spans_before + num_spans > s.max_spans) {
      error = CudaStepError::kTooManyRows;  // what places there are stay empty
      num_blocks = places_left(s.max_blocks, blocks_before, num_blocks);
      num_spans = places_left(s.max_spans, spans_before, num_spans);
    } else {
      error = check_pages(block, args, chunk);
    }
  }
  const bool good = error == CudaStepError::kNone;
  StepChunk place{};
  if (good) {
    const bool is_short = chunk.chunk_start + chunk.chunk_tokens < s.min_context_tokens;
    place = {chunk.q_begin, chunk.chunk_tokens, chunk.chunk_start, chunk.table_row, 0, 0, 0, is_short ? 1 : 0};
  }
  place.first_block = static_cast<std::int32_t>(blocks_before < s.max_blocks ? blocks_before : s.max_blocks);
  place.first_span = static_cast<std::int32_t>(spans_before < s.max_spans ? spans_before : s.max_spans);
  place.num_spans = num_spans;
  if (block.index() == 0) {
    if (!good) block.report(args.error, static_cast<std::int32_t>(error));
    args.tables.chunks[b] = place;
    if (b + 1 == s.num_chunks) {
      const std::int32_t first_pair =
          static_cast<std::int32_t>(pairs_before < s.max_pairs ? pairs_before : s.max_pairs);
      *args.tables.header = {place.first_block + num_blocks, first_pair + num_pairs,
                             (place.first_span + num_spans) * s.sub_groups};
    }
  }
  const auto block_at = [&](std::int32_t i) {
    if (!good) return QueryBlock{};
    const std::int32_t edge = (chunk.chunk_start / s.block_tokens + i) * s.block_tokens;
    const std::int32_t end = chunk.chunk_start + chunk.chunk_tokens;
    const std::int32_t first = edge < chunk.chunk_start ? chunk.chunk_start : edge;
    const std::int32_t last = edge + s.block_tokens < end ? edge + s.block_tokens : end;
    return QueryBlock{b, chunk.q_begin + first - chunk.chunk_start, last - first, first};
  };
  for (std::int32_t i = block.index(); i < num_blocks; i += block.size()) {
    args.tables.blocks[blocks_before + i] = block_at(i);
  }
  for (std::int32_t i = block.index(); i < num_pairs; i += block.size()) {
    BlockPair pair{};
    const std::int32_t left = num_blocks - 2 * i;  // below 1 in a chunk whose blocks have no places
    if (good && left > 0) {
      pair.first_block = static_cast<std::int32_t>(blocks_before) + 2 * i;
      pair.num_blocks = left < 2 ? left : 2;
      for (std::int32_t k = 0; k < pair.num_blocks; ++k) pair.blocks[k] = block_at(2 * i + k);
      pair.chunk = place;
    }
    args.tables.pairs[pairs_before + i] = pair;
  }
}

}  // namespace compact
