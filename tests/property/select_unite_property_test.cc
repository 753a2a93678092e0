// Properties of selection and union over random steps; the ids are those of docs/design/method.md 8.4.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <random>
#include <string>
#include <vector>

#include "src/select/mean_key.h"
#include "tests/property/naive_lists.h"
#include "tests/unit/select_step.h"

namespace compact {
namespace {

using testing::ChunkSpec;
using testing::difference_to_naive;
using testing::pages_of_row;
using testing::SelectStep;
using testing::StepSpec;

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  std::int32_t below(std::int32_t end) {
    return static_cast<std::int32_t>(engine_() % static_cast<std::uint64_t>(end));
  }
  template <class T>
  T pick(std::initializer_list<T> values) {
    return *(values.begin() + below(static_cast<std::int32_t>(values.size())));
  }
  std::uint64_t word() { return engine_(); }

 private:
  std::mt19937_64 engine_;
};

// A step of the union alone: chunks, tables, mask.
struct UnionCase {
  std::vector<std::vector<std::int32_t>> tables;
  std::vector<ChunkView> chunks;
  UnionInput input;
  BlockMask mask;
  std::vector<std::uint8_t> priority;
};

UnionCase random_union_case(Random& random) {
  UnionCase c;
  const std::int32_t group = random.pick({1, 2, 4, 7, 8});
  c.input.num_kv_heads = 1 + random.below(3);
  c.input.num_q_heads = group * c.input.num_kv_heads;
  c.input.page_tokens = random.pick({1, 4, 16, 24, 128});
  c.input.num_physical_pages = 300;
  c.input.forced = {random.pick({0, 0, 1, c.input.page_tokens, 5 * c.input.page_tokens + 1}),
                    random.pick({0, 0, 1, c.input.page_tokens, 3 * c.input.page_tokens, 7 * c.input.page_tokens - 1})};
  UnionOptions& options = c.input.options;
  options.mode = random.pick({UnionMode::kPaper, UnionMode::kSpan, UnionMode::kTile, UnionMode::kAdaptive});
  options.heads_per_unit = random.below(2) == 0 ? 0 : group;
  if (group == 8 && random.below(2) == 0) options.heads_per_unit = random.pick({1, 2, 4});
  if (options.mode == UnionMode::kAdaptive && random.below(3) == 0) options.heads_per_unit = kCheapestHeads;
  options.span_tokens = random.pick({1, 5, 16, 60, 128});
  options.max_inflation_1024ths = random.pick({0, 0, 1024, 1200, 4000});
  if (random.below(2) == 0) options.cost = {1024, random.below(4000), random.below(4000), random.below(20000)};
  const std::int32_t num_chunks = 1 + random.below(3);
  std::int32_t row = random.below(4);
  for (std::int32_t b = 0; b < num_chunks; ++b) {
    const std::int32_t pages = random.pick({0, 1, 3, 63, 64, 65, 130});
    const std::int32_t past = pages * c.input.page_tokens + random.pick({0, 1, c.input.page_tokens - 1});
    const std::int32_t tokens =
        random.pick({0, 1, 7, c.input.page_tokens, 2 * c.input.page_tokens + 3, 60, random.below(4) == 0 ? 500 : 60});
    c.tables.emplace_back();
    for (std::int32_t j = 0; j < (past + tokens + c.input.page_tokens - 1) / c.input.page_tokens; ++j) {
      c.tables.back().push_back(random.below(300));
    }
    c.chunks.push_back({row, tokens, past, nullptr});
    row += tokens + random.below(3);
  }
  for (std::size_t b = 0; b < c.chunks.size(); ++b) c.chunks[b].page_table = c.tables[b].data();
  c.input.chunks = c.chunks;
  const std::int32_t heads = random.below(2) == 0 ? c.input.num_q_heads : c.input.num_kv_heads;
  c.mask.reset(heads, c.input.page_tokens, c.chunks, make_query_blocks(c.chunks, random.pick({4, 16, 32, 128})));
  const std::int32_t density = random.below(5);  // words are ANDs of this many random words; 4: empty
  const bool alike = random.below(2) == 0;
  for (std::int32_t h = 0; h < heads; ++h) {
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(c.mask.blocks.size()); ++i) {
      const QueryBlock& block = c.mask.blocks[static_cast<std::size_t>(i)];
      const ChunkView& chunk = c.chunks[static_cast<std::size_t>(block.chunk)];
      for (std::int32_t j = 0; density < 4 && j < chunk.num_past_pages(c.input.page_tokens); ++j) {
        if (random.below(1 << (2 * density)) == 0) c.mask.row(h, i)[j / 64] |= std::uint64_t{1} << (j % 64);
      }
      // Neighbours that agree, so that merging pays.
      const bool first = i == 0 || c.mask.blocks[static_cast<std::size_t>(i - 1)].chunk != block.chunk;
      if (alike && !first && random.below(4) != 0) {
        std::copy_n(c.mask.row(h, i - 1), c.mask.words_per_row, c.mask.row(h, i));
      }
    }
  }
  options.list_dropped = random.below(3) == 0;
  if (random.below(3) == 0) {
    c.priority.resize(c.mask.words.size() * 64);
    for (std::uint8_t& priority : c.priority) priority = static_cast<std::uint8_t>(random.below(5) * 63);
  }
  c.input.page_priority = c.priority;
  return c;
}

std::vector<std::int32_t> list_of(const PageLists& lists, std::size_t u, std::int32_t page_tokens) {
  const AttentionUnit& unit = lists.units[u];
  const auto begin = lists.logical_pages.begin() + unit.list_begin;
  return {begin, begin + (unit.list_tokens + page_tokens - 1) / page_tokens};
}

// I19 with I1, I2, I12: the naive form checks coverage, minimality, order, units and records in every mode.
TEST(UnionProperty, TenThousandStepsEqualTheNaiveForm) {
  ThreadPool pool(2);
  PageLists lists;                       // reused: nothing of the step before may survive
  std::array<std::int64_t, 4> merged{};  // units of mode adaptive by number of leaves: 1, 2, 3 to 4, more
  for (std::uint64_t seed = 0; seed < 10000; ++seed) {
    Random random(seed);
    const UnionCase c = random_union_case(random);
    const Status status = build_page_lists(c.input, c.mask, lists, pool);
    ASSERT_TRUE(status.ok()) << "seed " << seed << ": " << status.message();
    ASSERT_EQ(difference_to_naive(c.input, c.mask, lists), "")
        << "seed " << seed << ", mode " << union_mode_name(c.input.options.mode);
    for (std::size_t u = 0; u < lists.units.size(); ++u) {
      const std::vector<std::int32_t> list = list_of(lists, u, c.input.page_tokens);
      ASSERT_TRUE(!c.priority.empty() ||
                  std::adjacent_find(list.begin(), list.end(), std::greater_equal<>()) == list.end())
          << "seed " << seed;
      if (c.input.options.mode != UnionMode::kAdaptive) continue;
      const std::int32_t leaf = 128 / (lists.heads_per_unit & -lists.heads_per_unit);
      const auto further_leaves = static_cast<std::uint32_t>((lists.units[u].q_len - 1) / leaf);
      ++merged[std::min<std::size_t>(static_cast<std::size_t>(std::bit_width(further_leaves)), merged.size() - 1)];
    }
    for (const UnionStats& stats : lists.chunk_stats) {
      ASSERT_GE(stats.union_inflation(), 1.0) << "seed " << seed;
      ASSERT_LE(stats.density(), 1.0) << "seed " << seed;
    }
  }
  for (const std::int64_t count : merged) EXPECT_GT(count, 100);  // trees of every depth were cut
}

PageLists lists_of(UnionCase& c, const UnionOptions& options, ThreadPool& pool) {
  c.input.options = options;
  PageLists lists;
  const Status status = build_page_lists(c.input, c.mask, lists, pool);
  EXPECT_TRUE(status.ok()) << status.message();
  return lists;
}

std::int64_t cost_of(const UnionCase& c, const PageLists& lists) {
  std::int64_t cost = 0;
  for (const AttentionUnit& unit : lists.units) {
    const std::int32_t pages = (unit.list_tokens + c.input.page_tokens - 1) / c.input.page_tokens;
    cost += unit_cost(c.input.options.cost, unit.q_len, lists.heads_per_unit, pages, c.input.page_tokens);
  }
  return cost;
}

bool same_units(const PageLists& a, const PageLists& b) {
  const auto fields = [](const AttentionUnit& unit) {
    return std::array{unit.q_begin,    unit.q_len,       unit.q_head,      unit.kv_head,
                      unit.list_begin, unit.list_tokens, unit.past_tokens, unit.causal_shift};
  };
  return a.heads_per_unit == b.heads_per_unit && a.page_ids == b.page_ids && a.logical_pages == b.logical_pages &&
         std::equal(a.units.begin(), a.units.end(), b.units.begin(), b.units.end(),
                    [&](const AttentionUnit& x, const AttentionUnit& y) { return fields(x) == fields(y); });
}

// I12: adaptive costs no more than its two extremes, by the model's own measure; the search over heads costs no more
// still. Coarser spans read more.
TEST(UnionProperty, AdaptiveCostsNoMoreThanTileOrPaper) {
  ThreadPool pool(1);
  std::int64_t cheaper_than_both = 0;
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    Random random(seed);
    UnionCase c = random_union_case(random);
    UnionOptions options = c.input.options;
    options.max_inflation_1024ths = 0;
    options.heads_per_unit = c.input.num_q_heads / c.input.num_kv_heads;
    options.mode = UnionMode::kTile;
    const PageLists tile = lists_of(c, options, pool);
    options.mode = UnionMode::kPaper;
    const PageLists paper = lists_of(c, options, pool);
    options.mode = UnionMode::kAdaptive;
    const PageLists adaptive = lists_of(c, options, pool);
    const std::int64_t bound = std::min(cost_of(c, tile), cost_of(c, paper));
    ASSERT_LE(cost_of(c, adaptive), bound) << "seed " << seed;
    cheaper_than_both += cost_of(c, adaptive) < bound ? 1 : 0;
    options.heads_per_unit = kCheapestHeads;
    ASSERT_LE(cost_of(c, lists_of(c, options, pool)), cost_of(c, adaptive)) << "seed " << seed;
    for (std::size_t b = 0; b < c.chunks.size(); ++b) {
      ASSERT_LE(tile.chunk_stats[b].listed_row_pages, adaptive.chunk_stats[b].listed_row_pages) << "seed " << seed;
      ASSERT_LE(adaptive.chunk_stats[b].listed_row_pages, paper.chunk_stats[b].listed_row_pages) << "seed " << seed;
      ASSERT_EQ(tile.chunk_stats[b].wanted_row_pages, paper.chunk_stats[b].wanted_row_pages) << "seed " << seed;
    }
  }
  EXPECT_GT(cheaper_than_both, 50);
}

// The bound on inflation holds for every merged unit: what exceeds it is a tile that no merge made.
TEST(UnionProperty, MaxInflationBoundsEveryMerge) {
  ThreadPool pool(1);
  for (std::uint64_t seed = 0; seed < 500; ++seed) {
    Random random(seed);
    UnionCase c = random_union_case(random);
    UnionOptions options = c.input.options;
    options.mode = UnionMode::kAdaptive;
    options.cost = {0, 0, 0, 1};  // units are all that costs: without a bound everything merges
    options.max_inflation_1024ths = 1500;
    if (options.heads_per_unit == kCheapestHeads) options.heads_per_unit = 0;
    const PageLists lists = lists_of(c, options, pool);
    const testing::NaiveUnion naive(c.input, c.mask);
    const std::int32_t leaf = 128 / (lists.heads_per_unit & -lists.heads_per_unit);
    for (const testing::NaiveUnit& unit : naive.units) {
      if (unit.tokens <= leaf) continue;
      ASSERT_LE(static_cast<std::int64_t>(unit.past.size()) * unit.tokens * lists.heads_per_unit * 1024,
                unit.wanted * 1500)
          << "seed " << seed;
    }
  }
}

// I11: one query block and G = 1, a span of C, and equal masks in all spans give the lists of mode paper.
TEST(UnionProperty, ModesMeetWhereTheyMust) {
  ThreadPool pool(1);
  for (std::uint64_t seed = 0; seed < 500; ++seed) {
    Random random(seed);
    UnionCase c = random_union_case(random);
    c.input.page_priority = {};
    UnionOptions options = c.input.options;
    options.heads_per_unit = c.input.num_q_heads / c.input.num_kv_heads;
    options.mode = UnionMode::kPaper;
    const PageLists paper = lists_of(c, options, pool);

    options.mode = UnionMode::kSpan;
    options.span_tokens = 1 << 20;  // all chunks lie in one span
    ASSERT_TRUE(same_units(lists_of(c, options, pool), paper)) << "seed " << seed;

    options.mode = UnionMode::kTile;
    if (options.heads_per_unit == 1 && std::all_of(c.chunks.begin(), c.chunks.end(), [](const ChunkView& chunk) {
          return chunk.chunk_tokens == 0 || chunk.chunk_start / 128 == (chunk.context_tokens() - 1) / 128;
        })) {
      ASSERT_TRUE(same_units(lists_of(c, options, pool), paper)) << "seed " << seed;
    }

    // Every row of a mask head gets the row of its chunk's first block; nothing is forced.
    c.input.forced = {0, 0};
    for (std::int32_t h = 0; h < c.mask.mask_heads; ++h) {
      std::int32_t first = 0;
      for (std::int32_t i = 0; i < static_cast<std::int32_t>(c.mask.blocks.size()); ++i) {
        const auto chunk_of = [&](std::int32_t x) { return c.mask.blocks[static_cast<std::size_t>(x)].chunk; };
        if (chunk_of(i) != chunk_of(first)) first = i;
        std::copy_n(c.mask.row(h, first), c.mask.words_per_row, c.mask.row(h, i));
      }
    }
    options.mode = UnionMode::kPaper;
    const PageLists equal_rows = lists_of(c, options, pool);
    for (const UnionMode mode : {UnionMode::kTile, UnionMode::kSpan, UnionMode::kAdaptive}) {
      options.mode = mode;
      options.span_tokens = 7;
      const PageLists lists = lists_of(c, options, pool);
      for (std::size_t u = 0; u < lists.units.size(); ++u) {
        const auto twin = std::find_if(equal_rows.units.begin(), equal_rows.units.end(), [&](const AttentionUnit& one) {
          return one.q_head == lists.units[u].q_head && one.q_begin <= lists.units[u].q_begin &&
                 lists.units[u].q_begin < one.q_begin + one.q_len;
        });
        ASSERT_NE(twin, equal_rows.units.end());
        ASSERT_EQ(list_of(lists, u, c.input.page_tokens),
                  list_of(equal_rows, static_cast<std::size_t>(twin - equal_rows.units.begin()), c.input.page_tokens))
            << "seed " << seed << ", mode " << union_mode_name(mode);
      }
    }
  }
}

// I16: the lists of one KV head, built alone, are the slice of the whole step's.
TEST(UnionProperty, ShardsAreSlices) {
  ThreadPool pool(1);
  for (std::uint64_t seed = 0; seed < 500; ++seed) {
    Random random(seed);
    UnionCase c = random_union_case(random);
    if (c.input.options.heads_per_unit == kCheapestHeads) c.input.options.heads_per_unit = 0;
    c.input.page_priority = {};
    const PageLists whole = lists_of(c, c.input.options, pool);
    const std::int32_t group = c.input.num_q_heads / c.input.num_kv_heads;
    for (std::int32_t g = 0; g < c.input.num_kv_heads; ++g) {
      UnionCase shard{.tables = {}, .chunks = {}, .input = c.input, .mask = {}, .priority = {}};
      shard.input.num_kv_heads = 1;
      shard.input.num_q_heads = group;
      const std::int32_t rows = c.mask.mask_heads / c.input.num_kv_heads;
      shard.mask.reset(rows, c.input.page_tokens, c.chunks, c.mask.blocks);
      for (std::int32_t h = 0; h < rows; ++h) {
        for (std::int32_t i = 0; i < static_cast<std::int32_t>(c.mask.blocks.size()); ++i) {
          std::copy_n(c.mask.row(g * rows + h, i), c.mask.words_per_row, shard.mask.row(h, i));
        }
      }
      const PageLists part = lists_of(shard, c.input.options, pool);
      std::size_t next = 0;
      for (std::size_t u = 0; u < whole.units.size(); ++u) {
        if (whole.units[u].kv_head != g) continue;
        ASSERT_LT(next, part.units.size());
        ASSERT_EQ(list_of(whole, u, c.input.page_tokens), list_of(part, next, c.input.page_tokens)) << "seed " << seed;
        ASSERT_EQ(whole.units[u].q_head, part.units[next].q_head + g * group);
        ASSERT_EQ(whole.units[u].q_begin, part.units[next].q_begin);
        ++next;
      }
      ASSERT_EQ(next, part.units.size());
    }
  }
}

TEST(UnionProperty, ThreadsChangeNothing) {
  ThreadPool one(1);
  ThreadPool two(2);
  ThreadPool five(5);
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    Random random(seed);
    UnionCase c = random_union_case(random);
    const PageLists lists = lists_of(c, c.input.options, one);
    ASSERT_TRUE(same_units(lists_of(c, c.input.options, two), lists)) << "seed " << seed;
    ASSERT_TRUE(same_units(lists_of(c, c.input.options, five), lists)) << "seed " << seed;
  }
}

// I14: a page that only the last query block of one head wants is in the chunk's list.
TEST(UnionProperty, AllQueryBlocksVote) {
  ThreadPool pool(1);
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    Random random(seed);
    UnionCase c = random_union_case(random);
    c.input.options = {};
    c.input.page_priority = {};
    c.input.forced = {0, 0};
    std::fill(c.mask.words.begin(), c.mask.words.end(), 0);
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(c.mask.blocks.size()); ++i) {
      const QueryBlock& block = c.mask.blocks[static_cast<std::size_t>(i)];
      const ChunkView& chunk = c.chunks[static_cast<std::size_t>(block.chunk)];
      const std::int32_t past = chunk.num_past_pages(c.input.page_tokens);
      const bool last = block.first_position + block.tokens == chunk.context_tokens();
      if (!last || past == 0) continue;
      const std::int32_t page = random.below(past);
      c.mask.row(0, i)[page / 64] |= std::uint64_t{1} << (page % 64);
      PageLists lists;
      ASSERT_TRUE(build_page_lists(c.input, c.mask, lists, pool).ok());
      for (std::size_t u = 0; u < lists.units.size(); ++u) {
        const bool same_chunk = lists.units[u].q_begin == block.q_begin + block.tokens - chunk.chunk_tokens;
        if (!same_chunk || lists.units[u].q_head != 0) continue;
        ASSERT_EQ(list_of(lists, u, c.input.page_tokens)[0], page) << "seed " << seed;
      }
    }
  }
}

// I3, I4 on lists: keep-all is the page table, an empty mask the forced pages alone.
TEST(UnionProperty, DenseMaskGivesTheDenseLists) {
  ThreadPool pool(1);
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    Random random(seed);
    UnionCase c = random_union_case(random);
    c.input.options = {};
    c.input.page_priority = {};
    for (std::int32_t h = 0; h < c.mask.mask_heads; ++h) {
      for (std::int32_t i = 0; i < static_cast<std::int32_t>(c.mask.blocks.size()); ++i) {
        const ChunkView& chunk = c.chunks[static_cast<std::size_t>(c.mask.blocks[static_cast<std::size_t>(i)].chunk)];
        for (std::int32_t j = 0; j < chunk.num_past_pages(c.input.page_tokens); ++j) {
          c.mask.row(h, i)[j / 64] |= std::uint64_t{1} << (j % 64);
        }
      }
    }
    PageLists lists;
    PageLists dense;
    ASSERT_TRUE(build_page_lists(c.input, c.mask, lists, pool).ok());
    ASSERT_TRUE(build_dense_lists(c.input, dense).ok());
    ASSERT_EQ(lists.units.size(), dense.units.size());
    ASSERT_EQ(lists.heads_per_unit, dense.heads_per_unit);
    for (std::size_t u = 0; u < lists.units.size(); ++u) {
      ASSERT_EQ(list_of(lists, u, c.input.page_tokens), list_of(dense, u, c.input.page_tokens)) << "seed " << seed;
      ASSERT_EQ(lists.units[u].list_tokens, dense.units[u].list_tokens);
      ASSERT_EQ(lists.units[u].past_tokens, dense.units[u].past_tokens);
      ASSERT_EQ(lists.units[u].q_head, dense.units[u].q_head);
    }
    for (std::size_t b = 0; b < c.chunks.size(); ++b) {
      ASSERT_EQ(lists.chunk_stats[b].listed_row_pages, dense.chunk_stats[b].listed_row_pages);
      ASSERT_EQ(lists.chunk_stats[b].wanted_row_pages, dense.chunk_stats[b].wanted_row_pages);
    }
  }
}

MeanKeyOptions random_options(Random& random) {
  MeanKeyOptions options;
  options.tile = random.pick({TileShape::kPacked, TileShape::kPerHead});
  options.visible = random.pick({PageVisibility::kLast, PageVisibility::kFirst, PageVisibility::kFull});
  options.norm = random.pick({ScoreNorm::kRow, ScoreNorm::kTile});
  options.vote = random.pick({RowVote::kMean, RowVote::kMax});
  if (options.norm == ScoreNorm::kTile || random.below(2) == 0) {
    options.alpha = random.pick({0.05F, 0.2F, 0.6F});
  } else {
    options.share = random.pick({0.01F, 0.04F, 0.1F});
  }
  return options;
}

// Random heads and pages; I16 asks for these groups.
StepSpec random_heads(Random& random) {
  StepSpec spec;
  spec.kv_heads = 1 + random.below(2);
  spec.q_heads = spec.kv_heads * random.pick({1, 2, 4, 7, 8});
  spec.head_dim = random.pick({8, 12, 16});
  spec.page_tokens = random.pick({16, 32, 128});
  return spec;
}

BlockMask select_ok(const SelectStep& step, const MeanKeyOptions& options, std::int32_t threads = 1) {
  BlockMask mask;
  ThreadPool pool(threads);
  const Status status = select_mean_key_cpu(step.select_input(), options, mask, pool);
  EXPECT_TRUE(status.ok()) << status.message();
  return mask;
}

// I5: a stricter threshold never adds a page.
TEST(MeanKeyProperty, Monotone) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    Random random(seed);
    StepSpec spec = random_heads(random);
    spec.chunks = {{spec.page_tokens * (1 + random.below(40)) + random.below(spec.page_tokens), 1 + random.below(200)}};
    const SelectStep step(spec);
    MeanKeyOptions options = random_options(random);
    float& threshold = options.alpha >= 0 ? options.alpha : options.share;
    BlockMask before;
    for (const float value : {0.0F, 0.001F, 0.01F, 0.03F, 0.1F, 0.3F, 0.7F, 1.0F}) {
      threshold = value;
      const BlockMask mask = select_ok(step, options);
      for (std::size_t w = 0; w < before.words.size(); ++w) ASSERT_EQ(mask.words[w] & ~before.words[w], 0U);
      before = mask;
    }
  }
}

// Rows of the mask by absolute block, for the blocks that no chunk edge cuts, with the pages that are past.
struct TileRow {
  std::int32_t first_position;
  std::int32_t tokens;
  std::int32_t head;
  std::int32_t past_pages;
  std::vector<std::int32_t> pages;
};

std::vector<TileRow> rows_in_chunking(const StepSpec& base, std::int32_t start, std::int32_t end,
                                      std::int32_t chunk_tokens, const MeanKeyOptions& options) {
  std::vector<TileRow> rows;
  for (std::int32_t s = start; s < end;) {
    const std::int32_t tokens = std::min(chunk_tokens - s % chunk_tokens, end - s);
    StepSpec spec = base;
    spec.chunks = {{s, tokens}};
    spec.page_seed = static_cast<std::uint64_t>(s + chunk_tokens);
    const SelectStep step(spec);
    const BlockMask mask = select_ok(step, options);
    EXPECT_EQ(mask.nonfinite_rows, 0);
    for (std::int32_t h = 0; h < mask.mask_heads; ++h) {
      for (std::int32_t i = 0; i < static_cast<std::int32_t>(mask.blocks.size()); ++i) {
        const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
        rows.push_back({block.first_position, block.tokens, h, s / spec.page_tokens, pages_of_row(mask, h, i)});
      }
    }
    s += tokens;
  }
  return rows;
}

// I6: chunk edges change which pages may be dropped, never the decision about a page that is past in both chunkings.
TEST(MeanKeyProperty, ChunkSizeDoesNotChangeTilesThatItDoesNotCut) {
  std::int64_t compared = 0;
  std::int64_t kept = 0;
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    Random random(seed);
    StepSpec spec = random_heads(random);
    const MeanKeyOptions options = random_options(random);
    const std::int32_t group = spec.q_heads / spec.kv_heads;
    const std::int32_t block_tokens = mean_key_block_tokens(options.tile, group, spec.page_tokens);
    const std::int32_t end = 2048 + random.below(200);
    const std::vector<TileRow> whole = rows_in_chunking(spec, 512, end, 1 << 20, options);
    for (const std::int32_t chunk_tokens : {128, 512, 1000, 1024}) {
      for (const TileRow& row : rows_in_chunking(spec, 512, end, chunk_tokens, options)) {
        const auto twin = std::find_if(whole.begin(), whole.end(), [&](const TileRow& other) {
          return other.head == row.head && other.first_position == row.first_position && other.tokens == row.tokens;
        });
        if (row.tokens != block_tokens && row.first_position + row.tokens != end) continue;  // cut
        ASSERT_NE(twin, whole.end());
        std::vector<std::int32_t> pages = row.pages;
        pages.erase(std::lower_bound(pages.begin(), pages.end(), twin->past_pages), pages.end());
        ASSERT_EQ(pages, twin->pages) << "seed " << seed << ", chunk " << chunk_tokens << ", position "
                                      << row.first_position << ", mask head " << row.head;
        compared += twin->past_pages;
        kept += static_cast<std::int64_t>(pages.size());
      }
    }
  }
  // The test separates: neither everything nor nothing was kept.
  EXPECT_GT(kept, compared / 100);
  EXPECT_LT(kept, compared * 9 / 10);
}

// I7: every residue of S and L, chunks of one token and inside one page.
TEST(MeanKeyProperty, RaggedChunksEqualTheReferenceAndTheNaiveUnion) {
  Random random(7);
  ThreadPool pool(2);
  for (std::int32_t start = 0; start < 70; ++start) {
    for (const std::int32_t tokens : {1, 3, 15, 16, 17, 33}) {
      StepSpec spec = random_heads(random);
      spec.page_tokens = 16;
      spec.chunks = {{start, tokens, static_cast<std::uint64_t>(start + 1)}};
      const SelectStep step(spec);
      const MeanKeyOptions options = random_options(random);
      const BlockMask mask = select_ok(step, options, 2);
      ASSERT_EQ(mask.nonfinite_rows, 0);
      BlockMask reference;
      std::vector<double> margins;
      ASSERT_TRUE(select_mean_key_reference(step.select_input(), options, reference, nullptr, &margins).ok());
      ASSERT_EQ(mask.words.size(), reference.words.size());
      for (std::size_t bit = 0; bit < margins.size(); ++bit) {
        if (std::abs(margins[bit]) < 1e-4) continue;
        ASSERT_EQ((mask.words[bit / 64] >> (bit % 64)) & 1U, (reference.words[bit / 64] >> (bit % 64)) & 1U)
            << "S " << start << ", C " << tokens << ", bit " << bit;
      }
      UnionInput input = step.union_input();
      input.forced = {random.pick({0, 20}), random.pick({0, 40})};
      input.options.mode = random.pick({UnionMode::kPaper, UnionMode::kTile, UnionMode::kAdaptive});
      PageLists lists;
      ASSERT_TRUE(build_page_lists(input, mask, lists, pool).ok());
      ASSERT_EQ(difference_to_naive(input, mask, lists), "") << "S " << start << ", C " << tokens;
    }
  }
}

// I10: physical order and neighbours in the batch change nothing. Spare pages, spare rows and the means of incomplete
// pages are NaN in every step of these tests.
TEST(MeanKeyProperty, PhysicalPagesAndTheRestOfTheBatchChangeNothing) {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    Random random(seed);
    StepSpec spec = random_heads(random);
    const MeanKeyOptions options = random_options(random);
    for (std::uint64_t stream = 1; stream <= 3; ++stream) {
      spec.chunks.push_back({random.below(40 * spec.page_tokens), random.below(150), stream});
    }
    const SelectStep batch(spec);
    StepSpec moved = spec;
    moved.page_seed = 99;
    const BlockMask mask = select_ok(batch, options);
    EXPECT_EQ(mask.nonfinite_rows, 0);
    EXPECT_EQ(mask.words, select_ok(SelectStep(moved), options).words);

    std::int32_t first_block = 0;
    for (const ChunkSpec& chunk : spec.chunks) {
      StepSpec alone = spec;
      alone.chunks = {chunk};
      const BlockMask single = select_ok(SelectStep(alone), options);
      for (std::int32_t h = 0; h < single.mask_heads; ++h) {
        for (std::int32_t i = 0; i < static_cast<std::int32_t>(single.blocks.size()); ++i) {
          ASSERT_EQ(pages_of_row(single, h, i), pages_of_row(mask, h, first_block + i)) << "seed " << seed;
        }
      }
      first_block += static_cast<std::int32_t>(single.blocks.size());
    }
    EXPECT_EQ(first_block, static_cast<std::int32_t>(mask.blocks.size()));
  }
}

}  // namespace
}  // namespace compact
