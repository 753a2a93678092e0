// Masks -> unions -> page lists, 64 pages a word (docs/design/method.md 5.1, 5.2 mode `paper`, 5.5, forced pages of
// section 4).
//
// Two parallel passes over units with one prefix sum between them: OR the member rows and count, then emit each list
// into its own region. Integer work throughout: any number of threads gives the same lists.
#include "compact/block_union.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "src/core/bit_words.h"

namespace compact {
namespace {

// Resolved and checked form of UnionInput.
struct Shape {
  std::int32_t group = 1;  // G
  std::int32_t heads_per_unit = 1;
  std::int32_t units_per_chunk = 0;  // KV heads x sub-groups
};

Result<Shape> check_union_input(const UnionInput& input) {
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
  Shape shape;
  shape.group = input.num_q_heads / input.num_kv_heads;
  shape.heads_per_unit = input.heads_per_unit == 0 ? default_heads_per_unit(shape.group) : input.heads_per_unit;
  if (shape.heads_per_unit < 1 || shape.group % shape.heads_per_unit != 0) {
    return invalid_argument(fmt::format("unite: heads_per_unit is {}; allowed: 0 (default) or a divisor of G = {}",
                                        shape.heads_per_unit, shape.group));
  }
  shape.units_per_chunk = input.num_q_heads / shape.heads_per_unit;

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

// The mask's blocks must cover every chunk exactly, in order, and name past pages only.
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

// Sink and window of one query block, past pages only.
void add_forced_pages(const UnionInput& input, const QueryBlock& block, std::int32_t past_pages, std::uint64_t* words) {
  const ForcedRanges ranges = forced_ranges(input.forced, block, input.page_tokens, past_pages);
  set_bits(words, 0, ranges.sink_end);
  set_bits(words, ranges.window_begin, ranges.window_end);
}

struct ChunkPlan {
  std::int32_t chunk = 0;
  std::int32_t first_block = 0;  // in mask.blocks
  std::int32_t num_blocks = 0;
  std::int32_t past_pages = 0;  // Np
  std::int32_t num_pages = 0;   // Kb
};

AttentionUnit make_unit(const ChunkView& chunk, const Shape& shape, std::int32_t sub_group, std::int32_t page_tokens,
                        std::int32_t listed_past_pages) {
  AttentionUnit unit;
  unit.q_begin = chunk.q_begin;
  unit.q_len = chunk.chunk_tokens;
  unit.q_head = sub_group * shape.heads_per_unit;
  unit.kv_head = unit.q_head / shape.group;
  // The older tokens of the boundary page precede the chunk.
  unit.past_tokens = listed_past_pages * page_tokens + chunk.chunk_start % page_tokens;
  unit.list_tokens = unit.past_tokens + chunk.chunk_tokens;
  unit.causal_shift = 0;  // the span is the whole chunk
  return unit;
}

}  // namespace

std::int32_t default_heads_per_unit(std::int32_t group) noexcept {
  if (group <= 4) return std::max(1, group);
  for (std::int32_t heads = 4; heads > 1; --heads) {
    if (group % heads == 0) return heads;
  }
  return group;
}

Status build_page_lists(const UnionInput& input, const BlockMask& mask, PageLists& lists, ThreadPool& pool) {
  CA_ASSIGN_OR_RETURN(const Shape shape, check_union_input(input));
  CA_RETURN_IF_ERROR(check_mask(input, mask));

  std::vector<ChunkPlan> plans;  // chunks with tokens
  for (std::int32_t b = 0, block = 0; b < static_cast<std::int32_t>(input.chunks.size()); ++b) {
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(b)];
    if (chunk.chunk_tokens == 0) continue;
    ChunkPlan plan{b, block, 0, chunk.num_past_pages(input.page_tokens), chunk.num_pages(input.page_tokens)};
    while (block < static_cast<std::int32_t>(mask.blocks.size()) &&
           mask.blocks[static_cast<std::size_t>(block)].chunk == b) {
      ++block;
    }
    plan.num_blocks = block - plan.first_block;
    plans.push_back(plan);
  }

  const std::int64_t num_units = static_cast<std::int64_t>(plans.size()) * shape.units_per_chunk;
  const auto words_per_row = static_cast<std::size_t>(mask.words_per_row);
  std::vector<std::uint64_t> unions(static_cast<std::size_t>(num_units) * words_per_row);           // [U, words]
  std::vector<std::uint64_t> forced(static_cast<std::size_t>(pool.num_threads()) * words_per_row);  // [threads, words]
  std::vector<std::int32_t> listed(static_cast<std::size_t>(num_units));                            // [U] past pages
  std::vector<std::int64_t> wanted(static_cast<std::size_t>(num_units));                            // [U] row pages

  const bool packed = mask.mask_heads != input.num_q_heads;
  const auto unite = [&](std::int64_t u, std::int32_t thread) {
    const ChunkPlan& plan = plans[static_cast<std::size_t>(u / shape.units_per_chunk)];
    const auto q_head = static_cast<std::int32_t>(u % shape.units_per_chunk) * shape.heads_per_unit;
    // A packed row is inherited by every sub-group of its KV head and stands for all heads of this unit.
    const std::int32_t first_row = packed ? q_head / shape.group : q_head;
    const std::int32_t num_rows = packed ? 1 : shape.heads_per_unit;
    const std::int32_t heads_per_row = packed ? shape.heads_per_unit : 1;
    std::uint64_t* united = unions.data() + static_cast<std::size_t>(u) * words_per_row;
    std::uint64_t* block_forced = forced.data() + static_cast<std::size_t>(thread) * words_per_row;
    std::int64_t wanted_row_pages = 0;
    for (std::int32_t i = plan.first_block; i < plan.first_block + plan.num_blocks; ++i) {
      const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
      std::fill_n(block_forced, words_per_row, 0);
      add_forced_pages(input, block, plan.past_pages, block_forced);
      for (std::int32_t h = 0; h < num_rows; ++h) {
        const std::uint64_t* row = mask.row(first_row + h, i);
        std::int32_t pages = 0;
        for (std::size_t w = 0; w < words_per_row; ++w) {
          const std::uint64_t word = row[w] | block_forced[w];
          united[w] |= word;
          pages += std::popcount(word);
        }
        wanted_row_pages += std::int64_t{pages} * block.tokens * heads_per_row;
      }
    }
    std::int32_t pages = 0;
    for (std::size_t w = 0; w < words_per_row; ++w) pages += std::popcount(united[w]);
    listed[static_cast<std::size_t>(u)] = pages;
    wanted[static_cast<std::size_t>(u)] = wanted_row_pages;
  };
  pool.parallel_for(num_units, unite);

  lists.heads_per_unit = shape.heads_per_unit;
  lists.units.clear();
  lists.chunk_stats.assign(input.chunks.size(), {});
  std::int64_t entries = 0;
  for (std::int64_t u = 0; u < num_units; ++u) {
    const ChunkPlan& plan = plans[static_cast<std::size_t>(u / shape.units_per_chunk)];
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(plan.chunk)];
    const std::int32_t past_pages = listed[static_cast<std::size_t>(u)];
    AttentionUnit unit =
        make_unit(chunk, shape, static_cast<std::int32_t>(u % shape.units_per_chunk), input.page_tokens, past_pages);
    unit.list_begin = static_cast<std::int32_t>(entries);
    lists.units.push_back(unit);
    entries += past_pages + (plan.num_pages - plan.past_pages);
    if (entries > std::numeric_limits<std::int32_t>::max()) {
      return invalid_argument(
          "unite: the page lists of the step hold more than 2^31 entries; take fewer chunks a step");
    }
    const std::int64_t rows = std::int64_t{chunk.chunk_tokens} * shape.heads_per_unit;
    lists.chunk_stats[static_cast<std::size_t>(plan.chunk)].add(
        {rows * past_pages, wanted[static_cast<std::size_t>(u)], rows * plan.past_pages});
  }

  lists.page_ids.resize(static_cast<std::size_t>(entries));
  lists.logical_pages.resize(static_cast<std::size_t>(entries));
  const auto emit = [&](std::int64_t u, std::int32_t) {
    const ChunkPlan& plan = plans[static_cast<std::size_t>(u / shape.units_per_chunk)];
    const std::int32_t* page_table = input.chunks[static_cast<std::size_t>(plan.chunk)].page_table;
    auto at = static_cast<std::size_t>(lists.units[static_cast<std::size_t>(u)].list_begin);
    const auto put = [&](std::int32_t j) {
      lists.logical_pages[at] = j;
      lists.page_ids[at++] = page_table[j];
    };
    for_each_bit(unions.data() + static_cast<std::size_t>(u) * words_per_row, mask.words_per_row, put);
    for (std::int32_t j = plan.past_pages; j < plan.num_pages; ++j) put(j);
  };
  pool.parallel_for(num_units, emit);
  return {};
}

Status build_dense_lists(const UnionInput& input, PageLists& lists) {
  CA_ASSIGN_OR_RETURN(const Shape shape, check_union_input(input));
  lists.heads_per_unit = shape.heads_per_unit;
  lists.units.clear();
  lists.page_ids.clear();
  lists.logical_pages.clear();
  lists.chunk_stats.assign(input.chunks.size(), {});
  for (std::size_t b = 0; b < input.chunks.size(); ++b) {
    const ChunkView& chunk = input.chunks[b];
    if (chunk.chunk_tokens == 0) continue;
    const std::int32_t past_pages = chunk.num_past_pages(input.page_tokens);
    const std::int32_t num_pages = chunk.num_pages(input.page_tokens);
    if (static_cast<std::int64_t>(lists.page_ids.size()) + num_pages > std::numeric_limits<std::int32_t>::max()) {
      return invalid_argument(
          "unite: the page lists of the step hold more than 2^31 entries; take fewer chunks a step");
    }
    // All heads read every page: one list serves all units of the chunk.
    const auto list_begin = static_cast<std::int32_t>(lists.page_ids.size());
    for (std::int32_t j = 0; j < num_pages; ++j) {
      lists.page_ids.push_back(chunk.page_table[j]);
      lists.logical_pages.push_back(j);
    }
    for (std::int32_t sub_group = 0; sub_group < shape.units_per_chunk; ++sub_group) {
      AttentionUnit unit = make_unit(chunk, shape, sub_group, input.page_tokens, past_pages);
      unit.list_begin = list_begin;
      lists.units.push_back(unit);
    }
    const std::int64_t row_pages = std::int64_t{chunk.chunk_tokens} * input.num_q_heads * past_pages;
    lists.chunk_stats[b] = {row_pages, row_pages, row_pages};
  }
  return {};
}

}  // namespace compact
