// recall_rows against a search of all lists: unions of random masks, masses at random.
#include "engine/eval/recall.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <vector>

#include "engine/eval/seeded_stream.h"

namespace compact::engine {
namespace {

constexpr std::int32_t kPage = 64;

struct Case {
  std::int32_t q_heads = 4;
  std::int32_t kv_heads = 2;
  std::int32_t chunk_start = 700;  // ten past pages and a boundary page
  std::int32_t chunk_tokens = 150;
  ForcedPages forced{.sink_tokens = 64, .window_tokens = 128};
  UnionOptions unite;
  double wanted = 0.3;  // share of pages in the mask
};

double uniform(SeededStream& stream) { return static_cast<double>(stream.below(1U << 20)) / (1U << 20); }

struct Made {
  std::vector<std::int32_t> page_table;
  ChunkView chunk;
  PageMass mass;
  BlockMask mask;
  PageLists lists;
};

Made make(const Case& shape, SeededStream& stream, ThreadPool& pool) {
  Made made;
  made.chunk = {0, shape.chunk_tokens, shape.chunk_start, nullptr};
  made.page_table.resize(static_cast<std::size_t>(made.chunk.num_pages(kPage)));
  std::iota(made.page_table.begin(), made.page_table.end(), 0);
  made.chunk.page_table = made.page_table.data();
  const std::int32_t past_pages = made.chunk.num_past_pages(kPage);

  made.mass.num_heads = shape.q_heads;
  made.mass.pages_per_row = past_pages;
  made.mass.blocks = make_query_blocks({&made.chunk, 1}, 32);
  for (std::size_t row = 0; row < made.mass.blocks.size() * static_cast<std::size_t>(shape.q_heads); ++row) {
    double sum = 0;
    std::vector<double> masses;
    for (std::int32_t j = 0; j <= past_pages; ++j) sum += masses.emplace_back(std::pow(uniform(stream), 4));
    for (std::int32_t j = 0; j < past_pages; ++j) {
      made.mass.past.push_back(static_cast<float>(masses[static_cast<std::size_t>(j)] / sum));
    }
    made.mass.chunk.push_back(static_cast<float>(masses.back() / sum));
    made.mass.nonfinite.push_back(0);
  }
  made.mask.reset(shape.q_heads, kPage, {&made.chunk, 1}, make_query_blocks({&made.chunk, 1}, 64));
  for (std::int32_t head = 0; head < shape.q_heads; ++head) {
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(made.mask.blocks.size()); ++i) {
      for (std::int32_t j = 0; j < past_pages; ++j) {
        if (uniform(stream) < shape.wanted) made.mask.row(head, i)[0] |= std::uint64_t{1} << j;
      }
    }
  }
  const Status status =
      build_page_lists({{&made.chunk, 1}, shape.q_heads, shape.kv_heads, kPage, 64, shape.forced, shape.unite},
                       made.mask, made.lists, pool);
  EXPECT_TRUE(status.ok()) << status.message();
  return made;
}

std::vector<RecallRow> rows_of(const Case& shape, const Made& made, ThreadPool& pool) {
  return recall_rows({made.mass, made.lists, shape.forced, kPage, made.chunk.num_past_pages(kPage)}, pool);
}

// The unit's rows one by one, its best list found by trying all.
void check_unit(const Case& shape, const Made& made, const AttentionUnit& unit, const std::vector<RecallRow>& rows,
                std::vector<int>& seen) {
  const std::int32_t past_pages = made.chunk.num_past_pages(kPage);
  std::set<std::int32_t> forced;
  struct Member {
    std::size_t index;
    std::int32_t tokens;
  };
  std::vector<Member> members;
  for (std::int32_t head = unit.q_head; head < unit.q_head + made.lists.heads_per_unit; ++head) {
    for (std::size_t i = 0; i < made.mass.blocks.size(); ++i) {
      const QueryBlock& block = made.mass.blocks[i];
      if (block.q_begin < unit.q_begin || block.q_begin >= unit.q_begin + unit.q_len) continue;
      const ForcedRanges ranges = forced_ranges(shape.forced, block, kPage, past_pages);
      for (std::int32_t j = 0; j < past_pages; ++j) {
        if (ranges.contains(j)) forced.insert(j);
      }
      members.push_back(
          {static_cast<std::size_t>(made.mass.row_index(head, static_cast<std::int32_t>(i))), block.tokens});
    }
  }
  std::uint32_t listed = 0;
  std::uint32_t free_pages = 0;
  for (std::int32_t j = 0; j < past_pages; ++j) {
    if (!forced.contains(j)) free_pages |= 1U << j;
  }
  for (std::int32_t n = 0; n * kPage < unit.list_tokens; ++n) {
    const std::int32_t page = made.lists.logical_pages[static_cast<std::size_t>(unit.list_begin + n)];
    if (page < past_pages) listed |= free_pages & (1U << page);
  }
  const auto mass_of = [&](std::size_t row, std::uint32_t pages) {
    double sum = 0;
    for (std::int32_t j = 0; j < past_pages; ++j) {
      if ((pages >> j & 1U) != 0) {
        sum += made.mass.past[row * static_cast<std::size_t>(past_pages) + static_cast<std::size_t>(j)];
      }
    }
    return sum;
  };
  const auto best = [&](const auto& value) {
    double most = -1;
    for (std::uint32_t pages = 0; pages < (1U << past_pages); ++pages) {
      if ((pages & ~free_pages) == 0 && std::popcount(pages) == std::popcount(listed))
        most = std::max(most, value(pages));
    }
    return most;
  };
  double oracle_sum = 0;
  for (const Member& member : members) {
    const RecallRow& row = rows[member.index];
    ASSERT_EQ(row.tokens, free_pages == 0 ? 0 : member.tokens);
    ++seen[member.index];
    if (free_pages == 0) continue;
    const double all = mass_of(member.index, (1U << past_pages) - 1);
    EXPECT_NEAR(row.row.fixed + row.row.far, all + made.mass.chunk[member.index], 1e-6);
    EXPECT_NEAR(row.row.far, mass_of(member.index, free_pages), 1e-6);
    EXPECT_NEAR(row.row.far_list, mass_of(member.index, listed), 1e-6);
    EXPECT_NEAR(row.row.far_row_oracle, best([&](std::uint32_t p) { return mass_of(member.index, p); }), 1e-6);
    EXPECT_LE(std::max(row.row.far_list, row.row.far_oracle), row.row.far_row_oracle + 1e-9);
    oracle_sum += member.tokens * row.row.far_oracle;
  }
  if (free_pages == 0) return;
  const double best_sum = best([&](std::uint32_t pages) {
    double sum = 0;
    for (const Member& member : members) sum += member.tokens * mass_of(member.index, pages);
    return sum;
  });
  EXPECT_NEAR(oracle_sum, best_sum, 1e-5);
}

TEST(Recall, IsThatOfTheListAndOfTheBestListsOfItsSize) {
  ThreadPool pool(2);
  std::int64_t chosen = 0;
  for (int seed = 0; seed < 40; ++seed) {
    SeededStream stream(fmt::format("recall {}", seed));
    Case shape;
    shape.unite.mode = static_cast<UnionMode>(seed % 4);
    shape.unite.span_tokens = shape.unite.mode == UnionMode::kSpan ? 64 : 0;
    shape.unite.heads_per_unit = seed % 3 == 0 ? 1 : 0;
    shape.chunk_start = 640 + static_cast<std::int32_t>(stream.below(100));
    shape.wanted = 0.1 * static_cast<double>(seed % 5);
    if (seed % 7 == 0) shape.forced = {};  // 256 and 512 tokens: of eleven pages all are forced
    const Made made = make(shape, stream, pool);
    const std::vector<RecallRow> rows = rows_of(shape, made, pool);
    SCOPED_TRACE(fmt::format("seed {}, mode {}, chunk of {} from {}", seed, union_mode_name(shape.unite.mode),
                             shape.chunk_tokens, shape.chunk_start));
    std::vector<int> seen(rows.size());
    for (const AttentionUnit& unit : made.lists.units) check_unit(shape, made, unit, rows, seen);
    EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), std::ssize(rows)) << "every row belongs to one unit";
    chosen += std::count_if(rows.begin(), rows.end(), [](const RecallRow& row) { return row.row.far_list > 0; });
  }
  EXPECT_GT(chosen, 100);
}

TEST(Recall, LeavesRowsWithoutMassesOut) {
  ThreadPool pool(1);
  const Case shape;
  SeededStream stream("nan");
  Made made = make(shape, stream, pool);
  const std::vector<RecallRow> before = rows_of(shape, made, pool);
  made.mass.chunk[1] = std::numeric_limits<float>::quiet_NaN();
  std::fill_n(made.mass.past.begin() + made.mass.pages_per_row, made.mass.pages_per_row, made.mass.chunk[1]);
  const std::vector<RecallRow> after = rows_of(shape, made, pool);
  EXPECT_EQ(after[1].tokens, 0);
  for (std::size_t i = 0; i < after.size(); ++i) {
    if (i == 1) continue;
    EXPECT_EQ(after[i].tokens, before[i].tokens);
    EXPECT_TRUE(std::isfinite(after[i].row.far_oracle));
  }
}

TEST(RecallSums, MeansAreWeightedByTokens) {
  RecallSums sums;
  EXPECT_EQ(sums.recall(), 1);
  sums.add({.fixed = 0.5, .far = 0.5, .far_list = 0.1, .far_oracle = 0.2, .far_row_oracle = 0.4}, 10);
  sums.add({.fixed = 0.9, .far = 0.1, .far_list = 0.1, .far_oracle = 0.1, .far_row_oracle = 0.1}, 30);
  EXPECT_DOUBLE_EQ(sums.recall(), (10 * 0.6 + 30 * 1.0) / 40);
  EXPECT_DOUBLE_EQ(sums.oracle_recall(), (10 * 0.7 + 30 * 1.0) / 40);
  EXPECT_DOUBLE_EQ(sums.row_oracle_recall(), (10 * 0.9 + 30 * 1.0) / 40);
  EXPECT_DOUBLE_EQ(sums.far_recall(), (10 * 0.1 + 30 * 0.1) / (10 * 0.5 + 30 * 0.1));
  EXPECT_DOUBLE_EQ(sums.vs_oracle(), (10 * 0.1 + 30 * 0.1) / (10 * 0.2 + 30 * 0.1));
}

TEST(RecallSpread, FivePercentStayBelow) {
  RecallSpread spread;
  EXPECT_EQ(spread.percentile5(), 1);
  spread.add(0.25, 4);
  spread.add(0.5, 2);
  spread.add(1.0, 94);
  EXPECT_DOUBLE_EQ(spread.percentile5(), 0.5);
  spread.add(0.1, 10);
  EXPECT_DOUBLE_EQ(spread.percentile5(), 0.1);
}

}  // namespace
}  // namespace compact::engine
