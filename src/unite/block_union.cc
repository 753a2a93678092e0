// Masks -> unions -> page lists, 64 pages a word (docs/design/method.md 5.1, 5.2, 5.4, 5.5, forced pages of section 4).
//
// Spans are fixed first; then parallel passes: OR the member rows of every (sub-group, span) and count; in mode
// adaptive merge neighbours on a tree; emit each list into its own region. Integer work throughout: any number of
// threads gives the same lists.
#include "compact/block_union.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>
#include <string>

#include "src/core/bit_words.h"
#include "src/unite/span_tree.h"
#include "src/unite/spans.h"
#include "src/unite/union_input.h"

namespace compact {
namespace {

std::int32_t divide_up(std::int32_t value, std::int32_t step) { return value / step + (value % step != 0 ? 1 : 0); }

constexpr std::array<const char*, 4> kModeNames = {"paper", "span", "tile", "adaptive"};  // [UnionMode]

// Sink and window of one query block, past pages only.
void add_forced_pages(const UnionInput& input, const QueryBlock& block, std::int32_t past_pages, std::uint64_t* words) {
  const std::int32_t page_tokens = input.page_tokens;
  set_bits(words, 0, std::min(past_pages, divide_up(input.forced.sink_tokens, page_tokens)));
  const std::int32_t window_pages = divide_up(input.forced.window_tokens, page_tokens);  // W
  if (window_pages == 0) return;
  // Pages that meet [(floor(p_first / P) - W + 1) P, p_last].
  const std::int32_t first = block.first_position / page_tokens - window_pages + 1;
  const std::int32_t last = (block.first_position + block.tokens - 1) / page_tokens;
  set_bits(words, std::max(0, first), std::min(past_pages, last + 1));
}

// The unit of a whole chunk that lists every page.
AttentionUnit whole_chunk_unit(const ChunkView& chunk, std::int32_t q_head, std::int32_t group) {
  AttentionUnit unit;
  unit.q_begin = chunk.q_begin;
  unit.q_len = chunk.chunk_tokens;
  unit.q_head = q_head;
  unit.kv_head = q_head / group;
  unit.past_tokens = chunk.chunk_start;
  unit.list_tokens = unit.past_tokens + chunk.chunk_tokens;
  return unit;
}

Status too_many_entries() {
  return invalid_argument("unite: the page lists of the step hold more than 2^31 entries; take fewer chunks a step");
}

// A chunk with tokens, its spans, and where its unions lie: [sub-group][span] from first_union on.
struct ChunkPlan {
  std::int32_t chunk = 0;
  std::int32_t past_pages = 0;   // Np
  std::int32_t chunk_pages = 0;  // Kb - Np
  std::vector<QuerySpan> spans{};
  std::int64_t first_union = 0;
};

// Spans of a step and the union of every (chunk, sub-group, span).
struct SpanUnions {
  std::int32_t heads_per_unit = 1;
  std::int32_t sub_groups = 0;  // Hq / heads_per_unit
  std::vector<ChunkPlan> plans;
  std::vector<std::int32_t> plan_of;  // [unions]
  std::vector<std::uint64_t> words;   // [unions, words_per_row]
  std::vector<std::int64_t> wanted;   // [unions]  rows * pages before the union
};

// Units of a step: neighbouring spans that share a list.
struct PlannedUnit {
  std::int64_t first_union = 0;  // unions [first_union, end_union), spans of one plan and sub-group
  std::int64_t end_union = 0;
};

std::int32_t span_tokens_of(const UnionOptions& options, std::int32_t heads_per_unit) {
  switch (options.mode) {
    case UnionMode::kPaper: return 0;
    case UnionMode::kSpan: return options.span_tokens;
    case UnionMode::kTile:
    case UnionMode::kAdaptive: break;
  }
  return tile_span_tokens(heads_per_unit);
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
  const bool packed = mask.mask_heads != input.num_q_heads;
  const auto unite = [&](std::int64_t u, std::int32_t thread) {
    const ChunkPlan& plan = result.plans[static_cast<std::size_t>(result.plan_of[static_cast<std::size_t>(u)])];
    const std::int64_t local = u - plan.first_union;
    const auto num_spans = static_cast<std::int64_t>(plan.spans.size());
    const QuerySpan& span = plan.spans[static_cast<std::size_t>(local % num_spans)];
    const auto q_head = static_cast<std::int32_t>(local / num_spans) * shape.heads_per_unit;
    // A packed row is inherited by every sub-group of its KV head and stands for all heads of this unit.
    const std::int32_t first_row = packed ? q_head / shape.group : q_head;
    const std::int32_t num_rows = packed ? 1 : shape.heads_per_unit;
    const std::int32_t heads_per_row = packed ? shape.heads_per_unit : 1;
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
      for (std::int32_t h = 0; h < num_rows; ++h) {
        const std::uint64_t* row = mask.row(first_row + h, i);
        for (std::size_t w = 0; w < words_per_row; ++w) {
          const std::uint64_t word = row[w] | block_forced[w];
          united[w] |= word;
          pages += std::popcount(word);
        }
      }
      result.wanted[static_cast<std::size_t>(u)] += pages * tokens * heads_per_row;
    }
  };
  pool.parallel_for(num_unions, unite);
  return result;
}

std::vector<PlannedUnit> every_span_alone(const SpanUnions& unions) {
  std::vector<PlannedUnit> units;
  units.reserve(unions.wanted.size());
  for (std::int64_t u = 0; u < static_cast<std::int64_t>(unions.wanted.size()); ++u) units.push_back({u, u + 1});
  return units;
}

// Mode adaptive; cost: of the whole step.
std::vector<PlannedUnit> merge_neighbours(const UnionInput& input, const SpanUnions& unions, std::int32_t words_per_row,
                                          ThreadPool& pool, std::int64_t& cost) {
  const std::int64_t sub_groups = unions.sub_groups;
  std::vector<SpanTreeResult> trees(unions.plans.size() * static_cast<std::size_t>(sub_groups));
  const auto first_leaf = [&](std::int64_t tree) {
    const ChunkPlan& plan = unions.plans[static_cast<std::size_t>(tree / sub_groups)];
    return plan.first_union + tree % sub_groups * static_cast<std::int64_t>(plan.spans.size());
  };
  pool.parallel_for(static_cast<std::int64_t>(trees.size()), [&](std::int64_t tree, std::int32_t) {
    const ChunkPlan& plan = unions.plans[static_cast<std::size_t>(tree / sub_groups)];
    const auto first = static_cast<std::size_t>(first_leaf(tree));
    SpanTreeInput leaves{.leaves = plan.spans};
    leaves.words = unions.words.data() + first * static_cast<std::size_t>(words_per_row);
    leaves.wanted = unions.wanted.data() + first;
    leaves.words_per_row = words_per_row;
    leaves.heads_per_unit = unions.heads_per_unit;
    leaves.chunk_pages = plan.chunk_pages;
    leaves.page_tokens = input.page_tokens;
    leaves.max_inflation_1024ths = input.options.max_inflation_1024ths;
    leaves.cost = input.options.cost;
    trees[static_cast<std::size_t>(tree)] = merge_spans(leaves);
  });
  std::vector<PlannedUnit> units;
  cost = 0;
  for (std::size_t tree = 0; tree < trees.size(); ++tree) {
    const std::int64_t first = first_leaf(static_cast<std::int64_t>(tree));
    std::int32_t begin = 0;
    for (const std::int32_t end : trees[tree].unit_ends) {
      units.push_back({first + begin, first + end});
      begin = end;
    }
    cost += trees[tree].cost;
  }
  return units;
}

}  // namespace

const char* union_mode_name(UnionMode mode) noexcept {
  const auto index = static_cast<std::size_t>(mode);
  return index < kModeNames.size() ? kModeNames[index] : "unknown";
}

Result<UnionMode> union_mode_from_name(std::string_view name) {
  for (std::size_t i = 0; i < kModeNames.size(); ++i) {
    if (name == kModeNames[i]) return static_cast<UnionMode>(i);
  }
  return invalid_argument(fmt::format("union mode is '{}'; allowed: {}", name, fmt::join(kModeNames, ", ")));
}

std::int32_t default_heads_per_unit(std::int32_t group) noexcept {
  if (group <= 4) return std::max(1, group);
  for (std::int32_t heads = 4; heads > 1; --heads) {
    if (group % heads == 0) return heads;
  }
  return group;
}

Status build_page_lists(const UnionInput& input, const BlockMask& mask, PageLists& lists, ThreadPool& pool) {
  CA_ASSIGN_OR_RETURN(UnionShape shape, check_union_input(input));
  CA_RETURN_IF_ERROR(check_mask(input, mask));

  SpanUnions unions = unite_spans(input, mask, shape, pool);
  std::vector<PlannedUnit> planned;
  if (input.options.mode == UnionMode::kAdaptive) {
    std::int64_t cost = 0;
    planned = merge_neighbours(input, unions, mask.words_per_row, pool, cost);
    // A packed mask gives every sub-group the same rows: splitting the heads could only cost more.
    const bool packed = mask.mask_heads != input.num_q_heads;
    while (shape.cheapest_heads && !packed && shape.heads_per_unit > 1) {
      do --shape.heads_per_unit;
      while (shape.group % shape.heads_per_unit != 0);
      SpanUnions finer = unite_spans(input, mask, shape, pool);
      std::int64_t finer_cost = 0;
      std::vector<PlannedUnit> finer_planned = merge_neighbours(input, finer, mask.words_per_row, pool, finer_cost);
      if (finer_cost >= cost) continue;  // ties: more heads to a list
      cost = finer_cost;
      unions = std::move(finer);
      planned = std::move(finer_planned);
    }
  } else {
    planned = every_span_alone(unions);
  }

  // The union of a unit takes the place of its first span's.
  const auto words_per_row = static_cast<std::size_t>(mask.words_per_row);
  const auto union_of = [&](const PlannedUnit& unit) {
    return unions.words.data() + static_cast<std::size_t>(unit.first_union) * words_per_row;
  };
  std::vector<std::int32_t> listed(planned.size());  // [U] past pages
  pool.parallel_for(static_cast<std::int64_t>(planned.size()), [&](std::int64_t u, std::int32_t) {
    const PlannedUnit& unit = planned[static_cast<std::size_t>(u)];
    std::uint64_t* united = union_of(unit);
    for (std::int64_t i = unit.first_union + 1; i < unit.end_union; ++i) {
      const std::uint64_t* other = unions.words.data() + static_cast<std::size_t>(i) * words_per_row;
      for (std::size_t w = 0; w < words_per_row; ++w) united[w] |= other[w];
    }
    for (std::size_t w = 0; w < words_per_row; ++w) listed[static_cast<std::size_t>(u)] += std::popcount(united[w]);
  });

  lists.heads_per_unit = unions.heads_per_unit;
  lists.units.clear();
  lists.chunk_stats.assign(input.chunks.size(), {});
  std::int64_t entries = 0;
  for (std::size_t u = 0; u < planned.size(); ++u) {
    const auto first = static_cast<std::size_t>(planned[u].first_union);
    const auto end = static_cast<std::size_t>(planned[u].end_union);
    const ChunkPlan& plan = unions.plans[static_cast<std::size_t>(unions.plan_of[first])];
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(plan.chunk)];
    const std::size_t local = first - static_cast<std::size_t>(plan.first_union);
    const std::size_t first_span = local % plan.spans.size();
    const auto sub_group = static_cast<std::int32_t>(local / plan.spans.size());
    const QuerySpan& last = plan.spans[first_span + (end - first) - 1];
    const std::int32_t offset = plan.spans[first_span].offset;

    AttentionUnit unit = whole_chunk_unit(chunk, sub_group * unions.heads_per_unit, shape.group);
    unit.q_begin += offset;
    unit.q_len = last.offset + last.tokens - offset;
    unit.causal_shift = offset;
    unit.past_tokens -= (plan.past_pages - listed[u]) * input.page_tokens;
    unit.list_tokens = unit.past_tokens + chunk.chunk_tokens;
    unit.list_begin = static_cast<std::int32_t>(entries);
    entries += listed[u] + plan.chunk_pages;
    if (entries > std::numeric_limits<std::int32_t>::max()) return too_many_entries();
    const std::int64_t rows = std::int64_t{unit.q_len} * unions.heads_per_unit;
    std::int64_t wanted = 0;
    for (std::size_t i = first; i < end; ++i) wanted += unions.wanted[i];
    lists.chunk_stats[static_cast<std::size_t>(plan.chunk)].add({rows * listed[u], wanted, rows * plan.past_pages});
    lists.units.push_back(unit);
  }

  lists.page_ids.resize(static_cast<std::size_t>(entries));
  lists.logical_pages.resize(static_cast<std::size_t>(entries));
  pool.parallel_for(static_cast<std::int64_t>(planned.size()), [&](std::int64_t u, std::int32_t) {
    const PlannedUnit& unit = planned[static_cast<std::size_t>(u)];
    const ChunkPlan& plan =
        unions.plans[static_cast<std::size_t>(unions.plan_of[static_cast<std::size_t>(unit.first_union)])];
    const std::int32_t* page_table = input.chunks[static_cast<std::size_t>(plan.chunk)].page_table;
    auto at = static_cast<std::size_t>(lists.units[static_cast<std::size_t>(u)].list_begin);
    const auto put = [&](std::int32_t j) {
      lists.logical_pages[at] = j;
      lists.page_ids[at++] = page_table[j];
    };
    for_each_bit(union_of(unit), mask.words_per_row, put);
    for (std::int32_t j = plan.past_pages; j < plan.past_pages + plan.chunk_pages; ++j) put(j);
  });
  return {};
}

Status build_dense_lists(const UnionInput& input, PageLists& lists) {
  CA_ASSIGN_OR_RETURN(const UnionShape shape, check_union_input(input));
  lists.heads_per_unit = shape.heads_per_unit;
  lists.units.clear();
  lists.page_ids.clear();
  lists.logical_pages.clear();
  lists.chunk_stats.assign(input.chunks.size(), {});
  for (std::size_t b = 0; b < input.chunks.size(); ++b) {
    const ChunkView& chunk = input.chunks[b];
    if (chunk.chunk_tokens == 0) continue;
    const std::int32_t num_pages = chunk.num_pages(input.page_tokens);
    if (static_cast<std::int64_t>(lists.page_ids.size()) + num_pages > std::numeric_limits<std::int32_t>::max()) {
      return too_many_entries();
    }
    // All heads read every page: one list serves all units of the chunk.
    const auto list_begin = static_cast<std::int32_t>(lists.page_ids.size());
    for (std::int32_t j = 0; j < num_pages; ++j) {
      lists.page_ids.push_back(chunk.page_table[j]);
      lists.logical_pages.push_back(j);
    }
    for (std::int32_t q_head = 0; q_head < input.num_q_heads; q_head += shape.heads_per_unit) {
      lists.units.push_back(whole_chunk_unit(chunk, q_head, shape.group));
      lists.units.back().list_begin = list_begin;
    }
    const std::int64_t row_pages =
        std::int64_t{chunk.chunk_tokens} * input.num_q_heads * chunk.num_past_pages(input.page_tokens);
    lists.chunk_stats[b] = {row_pages, row_pages, row_pages};
  }
  return {};
}

}  // namespace compact
