// When to read every page: the crossover to dense (docs/design/method.md 5.3 and 7). Pure integer functions.
#include <fmt/format.h>

#include <utility>

#include "compact/attention.h"

namespace compact {
namespace {

std::int32_t list_pages(const AttentionUnit& unit, std::int32_t page_tokens) {
  // Only the last page of a list may be partly filled.
  return (unit.list_tokens + page_tokens - 1) / page_tokens;
}

// Units and list entries of one chunk; both lie together because lists are built chunk by chunk.
struct ChunkRange {
  std::size_t unit_begin = 0;
  std::size_t unit_end = 0;
  std::int32_t list_begin = 0;
  std::int32_t list_end = 0;
};

ChunkRange chunk_range(const PageLists& lists, const ChunkView& chunk, std::int32_t page_tokens,
                       std::size_t unit_begin) {
  ChunkRange range{unit_begin, unit_begin, 0, 0};
  for (; range.unit_end < lists.units.size(); ++range.unit_end) {
    const AttentionUnit& unit = lists.units[range.unit_end];
    if (unit.q_begin < chunk.q_begin || unit.q_begin - chunk.q_begin >= chunk.chunk_tokens) break;
    if (range.unit_end == unit_begin) range.list_begin = unit.list_begin;
    range.list_end = unit.list_begin + list_pages(unit, page_tokens);
  }
  return range;
}

// Appends units and entries of `from` in `range` to `to`.
void append(const PageLists& from, const ChunkRange& range, PageLists& to) {
  const auto shift = static_cast<std::int32_t>(to.page_ids.size()) - range.list_begin;
  for (std::size_t u = range.unit_begin; u < range.unit_end; ++u) {
    to.units.push_back(from.units[u]);
    to.units.back().list_begin += shift;
    if (from.dropped.empty()) continue;
    const auto ids = from.dropped_ids.begin() + from.dropped[u].begin;
    to.dropped.push_back({static_cast<std::int32_t>(to.dropped_ids.size()), from.dropped[u].count});
    to.dropped_ids.insert(to.dropped_ids.end(), ids, ids + from.dropped[u].count);
  }
  to.page_ids.insert(to.page_ids.end(), from.page_ids.begin() + range.list_begin,
                     from.page_ids.begin() + range.list_end);
  to.logical_pages.insert(to.logical_pages.end(), from.logical_pages.begin() + range.list_begin,
                          from.logical_pages.begin() + range.list_end);
}

}  // namespace

const char* dense_reason_name(DenseReason reason) noexcept {
  switch (reason) {
    case DenseReason::kNone: return "none";
    case DenseReason::kSelector: return "selector";
    case DenseReason::kFirstChunk: return "first_chunk";
    case DenseReason::kShortContext: return "short_context";
    case DenseReason::kHighDensity: return "high_density";
    case DenseReason::kRequested: return "requested";
  }
  return "unknown";
}

DenseReason crossover_before_selection(const CrossoverPolicy& policy, const ChunkView& chunk,
                                       std::int32_t page_tokens) noexcept {
  if (chunk.num_past_pages(page_tokens) == 0) return DenseReason::kFirstChunk;
  if (chunk.context_tokens() < policy.min_context_tokens) return DenseReason::kShortContext;
  return DenseReason::kNone;
}

Status crossover_after_union(const CrossoverPolicy& policy, const UnionInput& input, PageLists& lists,
                             std::span<DenseReason> reasons) {
  const std::size_t num_chunks = input.chunks.size();
  if (reasons.size() != num_chunks || lists.chunk_stats.size() != num_chunks) {
    return invalid_argument(fmt::format("crossover: {} reasons and lists of {} chunks; expected {} of both",
                                        reasons.size(), lists.chunk_stats.size(), num_chunks));
  }
  if (lists.heads_per_unit < 1 || input.page_tokens < 1 || input.num_q_heads % lists.heads_per_unit != 0) {
    return invalid_argument(fmt::format("crossover: {} query heads, {} heads per unit, {} tokens a page do not fit",
                                        input.num_q_heads, lists.heads_per_unit, input.page_tokens));
  }
  const std::int64_t dense_units = input.num_q_heads / lists.heads_per_unit;

  if (!lists.dropped.empty() && lists.dropped.size() != lists.units.size()) {
    return invalid_argument(
        fmt::format("crossover: dropped pages of {} units for {} units", lists.dropped.size(), lists.units.size()));
  }

  PageLists result;
  result.heads_per_unit = lists.heads_per_unit;
  result.chunk_stats = lists.chunk_stats;
  std::vector<std::size_t> dense_chunks;
  std::size_t next_unit = 0;
  for (std::size_t b = 0; b < num_chunks; ++b) {
    const ChunkView& chunk = input.chunks[b];
    const ChunkRange range = chunk_range(lists, chunk, input.page_tokens, next_unit);
    next_unit = range.unit_end;
    std::int64_t cost = 0;
    for (std::size_t u = range.unit_begin; u < range.unit_end; ++u) {
      cost += unit_cost(input.options.cost, lists.units[u].q_len, lists.heads_per_unit,
                        list_pages(lists.units[u], input.page_tokens), input.page_tokens);
    }
    const std::int64_t dense_cost =
        dense_units * unit_cost(input.options.cost, chunk.chunk_tokens, lists.heads_per_unit,
                                chunk.num_pages(input.page_tokens), input.page_tokens);
    // Without a past the lists hold every page already.
    const bool may_change =
        reasons[b] == DenseReason::kNone && chunk.chunk_tokens > 0 && chunk.num_past_pages(input.page_tokens) > 0;
    if (!may_change || cost * (1024 + policy.margin_1024ths) < dense_cost * 1024) {
      append(lists, range, result);
      continue;
    }
    UnionInput only = input;
    only.chunks = input.chunks.subspan(b, 1);
    only.options.heads_per_unit = lists.heads_per_unit;
    only.options.list_dropped = !lists.dropped.empty();
    PageLists dense;
    CA_RETURN_IF_ERROR(build_dense_lists(only, dense));
    append(dense, chunk_range(dense, chunk, input.page_tokens, 0), result);
    // What was wanted stays: the inflation then tells what the crossover reads on top.
    result.chunk_stats[b].listed_row_pages = result.chunk_stats[b].visible_row_pages;
    dense_chunks.push_back(b);
  }
  if (next_unit != lists.units.size()) {
    return invalid_argument(fmt::format("crossover: unit {} starts at row {}, outside the chunk whose turn it is",
                                        next_unit, lists.units[next_unit].q_begin));
  }
  // Nothing is changed before the last check has passed.
  for (const std::size_t b : dense_chunks) reasons[b] = DenseReason::kHighDensity;
  if (!dense_chunks.empty()) lists = std::move(result);
  return {};
}

}  // namespace compact
