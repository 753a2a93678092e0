#include "src/unite/union_input.h"

#include <fmt/format.h>

#include <limits>

#include "src/core/bit_words.h"

namespace compact {
namespace {

Result<UnionShape> resolve_options(const UnionInput& input) {
  const UnionOptions& options = input.options;
  const auto mode = static_cast<std::int32_t>(options.mode);
  if (mode < 0 || mode > static_cast<std::int32_t>(UnionMode::kAdaptive)) {
    return invalid_argument(fmt::format("unite: mode is {}; allowed: 0 to 3", mode));
  }
  UnionShape shape;
  shape.group = input.num_q_heads / input.num_kv_heads;
  const bool tiles = options.mode == UnionMode::kTile || options.mode == UnionMode::kAdaptive;
  shape.cheapest_heads = options.heads_per_unit == kCheapestHeads && options.mode == UnionMode::kAdaptive;
  shape.heads_per_unit = options.heads_per_unit;
  if (shape.heads_per_unit == 0) shape.heads_per_unit = tiles ? shape.group : default_heads_per_unit(shape.group);
  if (shape.cheapest_heads) shape.heads_per_unit = shape.group;
  if (shape.heads_per_unit < 1 || shape.group % shape.heads_per_unit != 0) {
    return invalid_argument(
        fmt::format("unite: heads_per_unit is {}; allowed: 0 (default), a divisor of G = {}, or -1 in mode adaptive",
                    shape.heads_per_unit, shape.group));
  }
  if (options.mode == UnionMode::kSpan && options.span_tokens < 1) {
    return invalid_argument(fmt::format("unite: span_tokens is {}; allowed: 1 or more", options.span_tokens));
  }
  if (options.max_inflation_1024ths != 0 && options.max_inflation_1024ths < 1024) {
    return invalid_argument(fmt::format("unite: max_inflation_1024ths is {}; allowed: 0 (no bound) or 1024 and more",
                                        options.max_inflation_1024ths));
  }
  constexpr std::int64_t kMostCost = 1 << 24;  // keeps sums of a step far below 2^63
  const CostModel& cost = options.cost;
  for (const std::int64_t value : {cost.tile, cost.m_tile, cost.list_tile, cost.unit}) {
    if (value < 0 || value > kMostCost) {
      return invalid_argument(fmt::format("unite: the cost model holds {}; allowed: 0 to {}", value, kMostCost));
    }
  }
  return shape;
}

}  // namespace

Result<UnionShape> check_union_input(const UnionInput& input) {
  if (input.num_kv_heads < 1 || input.num_q_heads < 1 || input.num_q_heads % input.num_kv_heads != 0) {
    return invalid_argument(fmt::format("unite: {} query heads and {} KV heads; allowed: a multiple of the KV heads",
                                        input.num_q_heads, input.num_kv_heads));
  }
  if (input.page_tokens < 1) {
    return invalid_argument(fmt::format("unite: page_tokens is {}; allowed: 1 or more", input.page_tokens));
  }
  if (input.forced.sink_tokens < 0 || input.forced.window_tokens < 0) {
    return invalid_argument(fmt::format("unite: {} sink and {} window tokens; allowed: 0 or more",
                                        input.forced.sink_tokens, input.forced.window_tokens));
  }
  CA_ASSIGN_OR_RETURN(const UnionShape shape, resolve_options(input));
  for (std::size_t b = 0; b < input.chunks.size(); ++b) {
    const ChunkView& chunk = input.chunks[b];
    if (chunk.q_begin < 0 || chunk.chunk_start < 0 || chunk.chunk_tokens < 0 ||
        std::int64_t{chunk.chunk_start} + chunk.chunk_tokens + input.page_tokens >
            std::numeric_limits<std::int32_t>::max()) {
      return invalid_argument(fmt::format(
          "unite: chunk {} has {} tokens from position {}, first row {}; allowed: none negative, context and "
          "a page below 2^31 tokens",
          b, chunk.chunk_tokens, chunk.chunk_start, chunk.q_begin));
    }
    if (chunk.chunk_tokens == 0) continue;
    if (chunk.page_table == nullptr) return invalid_argument(fmt::format("unite: chunk {} has no page table", b));
    for (std::int32_t j = 0; j < chunk.num_pages(input.page_tokens); ++j) {
      if (chunk.page_table[j] < 0 || chunk.page_table[j] >= input.num_physical_pages) {
        return invalid_argument(fmt::format("unite: chunk {}: page table entry {} is {}; allowed: 0..{}", b, j,
                                            chunk.page_table[j], input.num_physical_pages - 1));
      }
    }
  }
  return shape;
}

Status check_mask(const UnionInput& input, const BlockMask& mask) {
  if (mask.mask_heads != input.num_q_heads && mask.mask_heads != input.num_kv_heads) {
    return invalid_argument(
        fmt::format("unite: the mask has {} heads; allowed: {} (per query head) or {} (per KV head)", mask.mask_heads,
                    input.num_q_heads, input.num_kv_heads));
  }
  const auto num_blocks = static_cast<std::int32_t>(mask.blocks.size());
  if (mask.words_per_row < 0 ||
      static_cast<std::int64_t>(mask.words.size()) != std::int64_t{mask.mask_heads} * num_blocks * mask.words_per_row) {
    return invalid_argument(fmt::format("unite: the mask has {} words; expected {} heads x {} blocks x {} words",
                                        mask.words.size(), mask.mask_heads, num_blocks, mask.words_per_row));
  }
  if (!input.page_priority.empty() && input.page_priority.size() != mask.words.size() * 64) {
    return invalid_argument(fmt::format("unite: {} page priorities; allowed: none, or {} as the mask has bits",
                                        input.page_priority.size(), mask.words.size() * 64));
  }
  std::int32_t i = 0;
  for (std::size_t b = 0; b < input.chunks.size(); ++b) {
    const ChunkView& chunk = input.chunks[b];
    const std::int32_t past_pages = chunk.num_past_pages(input.page_tokens);
    std::int32_t done = 0;  // tokens of the chunk
    for (; done < chunk.chunk_tokens; ++i) {
      if (i == num_blocks) {
        return invalid_argument(fmt::format("unite: the mask's query blocks end before chunk {}, position {}", b,
                                            chunk.chunk_start + done));
      }
      const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
      if (block.chunk != static_cast<std::int32_t>(b) || block.first_position != chunk.chunk_start + done ||
          block.q_begin != chunk.q_begin + done || block.tokens < 1 || block.tokens > chunk.chunk_tokens - done) {
        return invalid_argument(fmt::format(
            "unite: query block {} of the mask has {} tokens of chunk {} from position {}, row {}; expected chunk {}, "
            "position {}, row {}, at most {} tokens",
            i, block.tokens, block.chunk, block.first_position, block.q_begin, b, chunk.chunk_start + done,
            chunk.q_begin + done, chunk.chunk_tokens - done));
      }
      if (mask.words_per_row < words_for_bits(past_pages)) {
        return invalid_argument(fmt::format("unite: mask rows have {} words; chunk {} has {} past pages",
                                            mask.words_per_row, b, past_pages));
      }
      for (std::int32_t head = 0; head < mask.mask_heads; ++head) {
        if (any_bit_from(mask.row(head, i), mask.words_per_row, past_pages)) {
          return invalid_argument(fmt::format(
              "unite: mask row (head {}, query block {}) names a page that is not past; chunk {} has {} past pages",
              head, i, b, past_pages));
        }
      }
      done += block.tokens;
    }
  }
  if (i != num_blocks) {
    return invalid_argument(fmt::format("unite: the mask has {} query blocks; the chunks have {}", num_blocks, i));
  }
  return {};
}

}  // namespace compact
