// Masks -> unions -> page lists, 64 pages a word (docs/design/method.md 5.1, 5.2, 5.4, 5.5, forced pages of section 4).
//
// Spans are fixed first (spans.h); then parallel passes: OR the member rows of every (sub-group, span) and count
// (span_unions.h); in mode adaptive merge neighbours on a tree (unit_plan.h, span_tree.h); emit each list into its own
// region (here). Integer work throughout: any number of threads gives the same lists.
#include "compact/block_union.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>

#include "src/core/bit_words.h"
#include "src/unite/unit_plan.h"

namespace compact {
namespace {

constexpr std::array<const char*, 4> kModeNames = {"paper", "span", "tile", "adaptive"};  // [UnionMode]

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

// Builds the lists of planned units; one pass after the other.
class ListBuilder {
 public:
  ListBuilder(const UnionInput& input, const BlockMask& mask, UnitPlan plan, PageLists& lists)
      : input_(input), mask_(mask), plan_(std::move(plan)), lists_(lists), words_(words_of(mask)) {
    listed_.resize(plan_.units.size());
  }

  // The union of a unit takes the place of its first span's.
  void unite(ThreadPool& pool) {
    for_units(pool, [this](std::size_t u, std::int32_t) {
      std::uint64_t* united = union_of(u);
      for (std::int64_t i = plan_.units[u].first_union + 1; i < plan_.units[u].end_union; ++i) {
        const std::uint64_t* other = plan_.unions.words.data() + static_cast<std::size_t>(i) * words_;
        for (std::size_t w = 0; w < words_; ++w) united[w] |= other[w];
      }
      for (std::size_t w = 0; w < words_; ++w) listed_[u] += std::popcount(united[w]);
    });
  }

  // Records, places of the lists, statistics.
  Status place() {
    lists_.heads_per_unit = plan_.unions.heads_per_unit;
    lists_.units.clear();
    lists_.dropped.clear();
    lists_.chunk_stats.assign(input_.chunks.size(), {});
    std::int64_t entries = 0;
    std::int64_t dropped = 0;
    for (std::size_t u = 0; u < plan_.units.size(); ++u) {
      const ChunkPlan& chunk_plan = chunk_plan_of(u);
      AttentionUnit unit = record_of(u);
      unit.list_begin = static_cast<std::int32_t>(entries);
      lists_.units.push_back(unit);
      entries += listed_[u] + chunk_plan.chunk_pages;
      if (input_.options.list_dropped) {
        lists_.dropped.push_back({static_cast<std::int32_t>(dropped), chunk_plan.past_pages - listed_[u]});
        dropped += lists_.dropped.back().count;
      }
      if (std::max(entries, dropped) > std::numeric_limits<std::int32_t>::max()) return too_many_entries();
      const std::int64_t rows = std::int64_t{unit.q_len} * lists_.heads_per_unit;
      std::int64_t wanted = 0;
      for (std::int64_t i = plan_.units[u].first_union; i < plan_.units[u].end_union; ++i) {
        wanted += plan_.unions.wanted[static_cast<std::size_t>(i)];
      }
      lists_.chunk_stats[static_cast<std::size_t>(chunk_plan.chunk)].add(
          {rows * listed_[u], wanted, rows * chunk_plan.past_pages});
    }
    lists_.page_ids.resize(static_cast<std::size_t>(entries));
    lists_.logical_pages.resize(static_cast<std::size_t>(entries));
    lists_.dropped_ids.resize(static_cast<std::size_t>(dropped));
    return {};
  }

  void emit(ThreadPool& pool) {
    const bool ordered = !input_.page_priority.empty();
    const std::size_t most_pages = words_ * 64;
    std::vector<std::uint8_t> priority(ordered ? static_cast<std::size_t>(pool.num_threads()) * most_pages : 0);
    for_units(pool, [&](std::size_t u, std::int32_t thread) {
      const ChunkPlan& chunk_plan = chunk_plan_of(u);
      const std::int32_t* page_table = input_.chunks[static_cast<std::size_t>(chunk_plan.chunk)].page_table;
      const auto begin = static_cast<std::size_t>(lists_.units[u].list_begin);
      std::size_t at = begin;
      for_each_bit(union_of(u), mask_.words_per_row, [&](std::int32_t j) { lists_.logical_pages[at++] = j; });
      if (ordered) {
        std::uint8_t* of_page = priority.data() + static_cast<std::size_t>(thread) * most_pages;
        find_priorities(u, of_page);
        const auto first = lists_.logical_pages.begin();
        std::stable_sort(first + static_cast<std::ptrdiff_t>(begin), first + static_cast<std::ptrdiff_t>(at),
                         [&](std::int32_t a, std::int32_t b) { return of_page[a] > of_page[b]; });
      }
      for (std::int32_t j = chunk_plan.past_pages; j < chunk_plan.past_pages + chunk_plan.chunk_pages; ++j) {
        lists_.logical_pages[at++] = j;
      }
      for (std::size_t i = begin; i < at; ++i) lists_.page_ids[i] = page_table[lists_.logical_pages[i]];
      if (!input_.options.list_dropped) return;
      auto to = static_cast<std::size_t>(lists_.dropped[u].begin);
      for (std::int32_t j = 0; j < chunk_plan.past_pages; ++j) {
        if (!test_bit(union_of(u), j)) lists_.dropped_ids[to++] = page_table[j];
      }
    });
  }

 private:
  static std::size_t words_of(const BlockMask& mask) { return static_cast<std::size_t>(mask.words_per_row); }

  template <class Body>
  void for_units(ThreadPool& pool, Body body) {
    pool.parallel_for(static_cast<std::int64_t>(plan_.units.size()),
                      [&](std::int64_t u, std::int32_t thread) { body(static_cast<std::size_t>(u), thread); });
  }

  std::uint64_t* union_of(std::size_t u) {
    return plan_.unions.words.data() + static_cast<std::size_t>(plan_.units[u].first_union) * words_;
  }
  [[nodiscard]] const ChunkPlan& chunk_plan_of(std::size_t u) const {
    const auto first = static_cast<std::size_t>(plan_.units[u].first_union);
    return plan_.unions.plans[static_cast<std::size_t>(plan_.unions.plan_of[first])];
  }
  // First span of the unit in its chunk's plan, and its sub-group.
  [[nodiscard]] std::pair<std::size_t, std::int32_t> first_span_of(std::size_t u) const {
    const ChunkPlan& chunk_plan = chunk_plan_of(u);
    const auto local = static_cast<std::size_t>(plan_.units[u].first_union - chunk_plan.first_union);
    return {local % chunk_plan.spans.size(), static_cast<std::int32_t>(local / chunk_plan.spans.size())};
  }
  [[nodiscard]] std::span<const QuerySpan> spans_of(std::size_t u) const {
    const auto count = static_cast<std::size_t>(plan_.units[u].end_union - plan_.units[u].first_union);
    return std::span(chunk_plan_of(u).spans).subspan(first_span_of(u).first, count);
  }

  [[nodiscard]] AttentionUnit record_of(std::size_t u) const {
    const ChunkPlan& chunk_plan = chunk_plan_of(u);
    const ChunkView& chunk = input_.chunks[static_cast<std::size_t>(chunk_plan.chunk)];
    const std::span<const QuerySpan> spans = spans_of(u);
    const std::int32_t heads = plan_.unions.heads_per_unit;
    AttentionUnit unit =
        whole_chunk_unit(chunk, first_span_of(u).second * heads, input_.num_q_heads / input_.num_kv_heads);
    unit.q_begin += spans.front().offset;
    unit.q_len = spans.back().offset + spans.back().tokens - spans.front().offset;
    unit.causal_shift = spans.front().offset;
    unit.past_tokens -= (chunk_plan.past_pages - listed_[u]) * input_.page_tokens;
    unit.list_tokens = unit.past_tokens + chunk.chunk_tokens;
    return unit;
  }

  // The largest priority that a row of the unit gives each page that it wants; 255 for forced pages.
  void find_priorities(std::size_t u, std::uint8_t* of_page) {
    const std::span<const QuerySpan> spans = spans_of(u);
    const MaskRows rows = mask_rows_of(input_, mask_, lists_.units[u].q_head, lists_.heads_per_unit);
    const std::size_t most_pages = words_ * 64;
    std::fill_n(of_page, most_pages, std::uint8_t{0});
    std::vector<std::uint64_t> forced(words_);
    for (std::int32_t i = spans.front().first_block; i < spans.back().end_block; ++i) {
      add_forced_pages(input_, mask_.blocks[static_cast<std::size_t>(i)], chunk_plan_of(u).past_pages, forced.data());
      for (std::int32_t h = rows.first; h < rows.first + rows.count; ++h) {
        const auto row = static_cast<std::size_t>(mask_.row(h, i) - mask_.words.data()) / words_;
        const std::uint8_t* given = input_.page_priority.data() + row * most_pages;
        for_each_bit(mask_.row(h, i), mask_.words_per_row,
                     [&](std::int32_t j) { of_page[j] = std::max(of_page[j], given[j]); });
      }
    }
    for_each_bit(forced.data(), mask_.words_per_row, [&](std::int32_t j) { of_page[j] = 255; });
  }

  const UnionInput& input_;
  const BlockMask& mask_;
  UnitPlan plan_;
  PageLists& lists_;
  std::size_t words_;
  std::vector<std::int32_t> listed_;  // [U]  past pages
};

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
  CA_ASSIGN_OR_RETURN(const UnionShape shape, check_union_input(input));
  CA_RETURN_IF_ERROR(check_mask(input, mask));
  ListBuilder builder(input, mask, plan_units(input, mask, shape, pool), lists);
  builder.unite(pool);
  CA_RETURN_IF_ERROR(builder.place());
  builder.emit(pool);
  return {};
}

Status build_dense_lists(const UnionInput& input, PageLists& lists) {
  CA_ASSIGN_OR_RETURN(const UnionShape shape, check_union_input(input));
  lists.heads_per_unit = shape.heads_per_unit;
  lists.units.clear();
  lists.page_ids.clear();
  lists.logical_pages.clear();
  lists.dropped.clear();
  lists.dropped_ids.clear();
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
      if (input.options.list_dropped) lists.dropped.push_back({});
    }
    const std::int64_t row_pages =
        std::int64_t{chunk.chunk_tokens} * input.num_q_heads * chunk.num_past_pages(input.page_tokens);
    lists.chunk_stats[b] = {row_pages, row_pages, row_pages};
  }
  return {};
}

}  // namespace compact
