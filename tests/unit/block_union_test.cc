#include "compact/block_union.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

namespace compact {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

// One request with P = 16; the physical page of logical page j is 100 - j.
class Union : public ::testing::Test {
 protected:
  void SetUp() override {
    table_.resize(100);
    for (std::int32_t j = 0; j < 100; ++j) table_[static_cast<std::size_t>(j)] = 100 - j;
    input_.num_q_heads = 4;
    input_.num_kv_heads = 2;
    input_.page_tokens = 16;
    input_.num_physical_pages = 101;
    input_.forced = {0, 0};
  }
  void chunk(std::int32_t start, std::int32_t tokens) {
    std::int32_t row = 0;
    for (const ChunkView& before : chunks_) row += before.chunk_tokens;
    chunks_.push_back({row, tokens, start, table_.data()});
    input_.chunks = chunks_;
  }
  void mask(std::int32_t heads, std::int32_t block_tokens = 16) {
    mask_.reset(heads, input_.page_tokens, chunks_, make_query_blocks(chunks_, block_tokens));
  }
  void want(std::int32_t head, std::int32_t block, std::int32_t page) {
    mask_.row(head, block)[page / 64] |= std::uint64_t{1} << (page % 64);
  }
  void unite() {
    ThreadPool pool(2);
    const Status status = build_page_lists(input_, mask_, lists_, pool);
    ASSERT_TRUE(status.ok()) << status.message();
  }
  std::string error() {
    ThreadPool pool(1);
    const Status status = build_page_lists(input_, mask_, lists_, pool);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  }
  std::vector<std::int32_t> pages(std::size_t u) const {
    const AttentionUnit& unit = lists_.units[u];
    const auto begin = lists_.logical_pages.begin() + unit.list_begin;
    return {begin, begin + (unit.list_tokens + input_.page_tokens - 1) / input_.page_tokens};
  }

  std::vector<std::int32_t> table_;
  std::vector<ChunkView> chunks_;
  UnionInput input_;
  BlockMask mask_;
  PageLists lists_;
};

TEST_F(Union, WorkedByHand) {
  chunk(70, 20);  // Np = 4, boundary page 4 with 6 past tokens, pages 4 and 5 are the chunk's; blocks 70..79, 80..89
  mask(4);
  want(0, 0, 3);
  want(1, 1, 0);
  want(2, 0, 1);
  want(3, 1, 1);
  unite();
  EXPECT_EQ(lists_.heads_per_unit, 2);
  ASSERT_EQ(lists_.units.size(), 2U);
  EXPECT_THAT(pages(0), ElementsAre(0, 3, 4, 5));
  EXPECT_THAT(pages(1), ElementsAre(1, 4, 5));
  EXPECT_THAT(lists_.page_ids, ElementsAre(100, 97, 96, 95, 99, 96, 95));
  const AttentionUnit& unit = lists_.units[1];
  EXPECT_EQ(unit.q_begin, 0);
  EXPECT_EQ(unit.q_len, 20);
  EXPECT_EQ(unit.q_head, 2);
  EXPECT_EQ(unit.kv_head, 1);
  EXPECT_EQ(unit.list_begin, 4);
  EXPECT_EQ(unit.past_tokens, 1 * 16 + 6);
  EXPECT_EQ(unit.list_tokens, 1 * 16 + 6 + 20);
  EXPECT_EQ(unit.causal_shift, 0);
  const UnionStats& stats = lists_.chunk_stats[0];
  EXPECT_EQ(stats.listed_row_pages, 40 * 2 + 40 * 1);
  EXPECT_EQ(stats.wanted_row_pages, 10 + 10 + 10 + 10);  // four rows of ten tokens want one page each
  EXPECT_EQ(stats.visible_row_pages, 20 * 4 * 4);
  EXPECT_DOUBLE_EQ(stats.density(), 120.0 / 320);
  EXPECT_DOUBLE_EQ(stats.union_inflation(), 3.0);
}

TEST_F(Union, PackedRowsStandForAllHeadsAndSubGroupsInheritThem) {
  input_.num_q_heads = 8;
  input_.options.heads_per_unit = 2;  // two sub-groups a KV head
  chunk(64, 16);
  mask(2);
  want(0, 0, 1);
  want(1, 0, 2);
  want(1, 0, 3);
  unite();
  ASSERT_EQ(lists_.units.size(), 4U);
  EXPECT_THAT(pages(0), ElementsAre(1, 4));
  EXPECT_THAT(pages(1), ElementsAre(1, 4));
  EXPECT_THAT(pages(2), ElementsAre(2, 3, 4));
  EXPECT_THAT(pages(3), ElementsAre(2, 3, 4));
  EXPECT_EQ(lists_.units[3].q_head, 6);
  EXPECT_EQ(lists_.units[3].kv_head, 1);
  EXPECT_EQ(lists_.chunk_stats[0].wanted_row_pages, 16 * 4 * 1 + 16 * 4 * 2);
  EXPECT_DOUBLE_EQ(lists_.chunk_stats[0].union_inflation(), 1.0);
}

TEST_F(Union, ForcedPagesBelongToEachQueryBlock) {
  // W = 2: block 160..175 (page 10) forces pages 9 and 10, block 176..191 pages 10 and 11; page 10 on is the chunk's.
  chunk(160, 32);
  input_.forced = {17, 32};  // two sink pages
  mask(2);
  unite();
  EXPECT_THAT(pages(0), ElementsAre(0, 1, 9, 10, 11));
  EXPECT_EQ(lists_.chunk_stats[0].listed_row_pages, 32 * 4 * 3);
  EXPECT_EQ(lists_.chunk_stats[0].wanted_row_pages, 16 * 4 * 3 + 16 * 4 * 2);
}

TEST_F(Union, WindowCountsPagesFromTheBlocksFirst) {
  chunk(168, 8);  // page 10 is the boundary page
  const auto with_window = [&](std::int32_t tokens) {
    input_.forced = {0, tokens};
    mask(2);
    unite();
    return pages(0);
  };
  EXPECT_THAT(with_window(0), ElementsAre(10));
  EXPECT_THAT(with_window(16), ElementsAre(10));
  EXPECT_THAT(with_window(17), ElementsAre(9, 10));
  EXPECT_THAT(with_window(64), ElementsAre(7, 8, 9, 10));
  EXPECT_THAT(with_window(1 << 30), ElementsAre(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10));
}

TEST_F(Union, SinkDoesNotPassThePast) {
  chunk(32, 8);
  input_.forced = {0x7fffffff, 0x7fffffff};
  mask(2);
  unite();
  EXPECT_THAT(pages(0), ElementsAre(0, 1, 2));
  EXPECT_EQ(lists_.chunk_stats[0].wanted_row_pages, 8 * 4 * 2);
}

TEST_F(Union, FirstChunkListsItsOwnPages) {
  chunk(0, 20);
  mask(4);
  unite();
  ASSERT_EQ(lists_.units.size(), 2U);
  EXPECT_THAT(pages(0), ElementsAre(0, 1));
  EXPECT_EQ(lists_.units[0].past_tokens, 0);
  EXPECT_EQ(lists_.units[0].list_tokens, 20);
  EXPECT_DOUBLE_EQ(lists_.chunk_stats[0].density(), 1.0);
  EXPECT_DOUBLE_EQ(lists_.chunk_stats[0].union_inflation(), 1.0);
}

TEST_F(Union, BoundaryPageWithoutPastPage) {
  chunk(5, 3);
  mask(4);
  unite();
  EXPECT_THAT(pages(0), ElementsAre(0));
  EXPECT_EQ(lists_.units[0].past_tokens, 5);
  EXPECT_EQ(lists_.units[0].list_tokens, 8);
}

TEST_F(Union, EmptyChunkHasNoUnit) {
  chunk(64, 0);
  chunks_[0].page_table = nullptr;
  chunk(64, 1);
  chunk(64, 0);
  mask(4);
  unite();
  ASSERT_EQ(lists_.units.size(), 2U);
  EXPECT_EQ(lists_.chunk_stats.size(), 3U);
  EXPECT_EQ(lists_.chunk_stats[0].visible_row_pages, 0);
  chunks_.clear();
  input_.chunks = chunks_;
  mask(4);
  unite();
  EXPECT_TRUE(lists_.units.empty());
  EXPECT_TRUE(lists_.page_ids.empty());
}

TEST_F(Union, DenseListsAreThePageTable) {
  chunk(70, 20);
  chunk(3, 0);
  chunk(0, 16);
  input_.num_q_heads = 16;  // G = 8: two sub-groups
  ASSERT_TRUE(build_dense_lists(input_, lists_).ok());
  EXPECT_EQ(lists_.heads_per_unit, 4);
  ASSERT_EQ(lists_.units.size(), 8U);
  for (std::size_t u = 0; u < 4; ++u) EXPECT_THAT(pages(u), ElementsAre(0, 1, 2, 3, 4, 5));
  for (std::size_t u = 4; u < 8; ++u) EXPECT_THAT(pages(u), ElementsAre(0));
  EXPECT_EQ(lists_.units[3].q_head, 12);
  EXPECT_EQ(lists_.units[3].kv_head, 1);
  EXPECT_EQ(lists_.units[3].past_tokens, 70);
  EXPECT_EQ(lists_.units[3].list_tokens, 90);
  EXPECT_THAT(lists_.page_ids, ElementsAre(100, 99, 98, 97, 96, 95, 100));
  EXPECT_DOUBLE_EQ(lists_.chunk_stats[0].density(), 1.0);
  EXPECT_EQ(lists_.chunk_stats[0].visible_row_pages, 20 * 16 * 4);
}

TEST_F(Union, SpansAreCutAtAbsoluteMultiples) {
  chunk(70, 20);  // tokens 70..89; query blocks 70..79, 80..89
  mask(2);
  want(0, 0, 1);
  want(0, 1, 2);
  want(1, 1, 3);
  input_.options.mode = UnionMode::kSpan;
  input_.options.span_tokens = 6;  // 70..71, 72..77, 78..83, 84..89
  unite();
  ASSERT_EQ(lists_.units.size(), 8U);
  EXPECT_THAT(pages(0), ElementsAre(1, 4, 5));
  EXPECT_THAT(pages(1), ElementsAre(1, 4, 5));
  EXPECT_THAT(pages(2), ElementsAre(1, 2, 4, 5));  // meets both blocks
  EXPECT_THAT(pages(3), ElementsAre(2, 4, 5));
  EXPECT_THAT(pages(4), ElementsAre(4, 5));
  EXPECT_THAT(pages(6), ElementsAre(3, 4, 5));
  const AttentionUnit& unit = lists_.units[7];
  EXPECT_EQ(unit.q_begin, 14);
  EXPECT_EQ(unit.q_len, 6);
  EXPECT_EQ(unit.q_head, 2);
  EXPECT_EQ(unit.kv_head, 1);
  EXPECT_EQ(unit.causal_shift, 14);
  EXPECT_EQ(unit.past_tokens, 16 + 6);
  EXPECT_EQ(unit.list_tokens, 16 + 6 + 20);  // the whole chunk stays in the list; the visibility rule hides the rest
  const UnionStats& stats = lists_.chunk_stats[0];
  EXPECT_EQ(stats.wanted_row_pages, 2 * (10 + 10) + 2 * 10);
  EXPECT_EQ(stats.listed_row_pages, 2 * (2 + 6 + 6 * 2 + 6) + 2 * (6 + 6));
}

TEST_F(Union, TilesHold128PackedRows) {
  input_.num_q_heads = 24;  // G = 12: hpt 4, 32 tokens; twelve heads are three M-tiles
  chunk(40, 70);
  mask(24);
  input_.options.mode = UnionMode::kTile;
  unite();
  EXPECT_EQ(lists_.heads_per_unit, 12);
  ASSERT_EQ(lists_.units.size(), 6U);
  EXPECT_EQ(lists_.units[0].q_len, 24);  // positions 40..63
  EXPECT_EQ(lists_.units[1].q_len, 32);
  EXPECT_EQ(lists_.units[2].q_len, 14);
  EXPECT_EQ(lists_.units[3].q_head, 12);
  input_.options.heads_per_unit = 3;  // hpt 1: 128 tokens
  unite();
  EXPECT_EQ(lists_.units.size(), 8U);
}

// G = 4, tiles of 32 tokens. Two neighbours want the same pages, the third others.
TEST_F(Union, AdaptiveMergesWhatIsAlike) {
  input_.num_q_heads = 4;
  input_.num_kv_heads = 1;
  chunk(1024, 128);
  mask(1, 32);
  const auto want_pages = [&](std::int32_t block, std::int32_t first) {
    for (std::int32_t j = first; j < first + 16; ++j) want(0, block, j);
  };
  want_pages(0, 0);
  want_pages(1, 0);
  want_pages(2, 16);
  want_pages(3, 32);
  input_.options.mode = UnionMode::kAdaptive;
  // 16 past + 8 chunk pages of 16 tokens are 3 list tiles. Alone: 3 * 1024 + m_tile + 3 * 358 + unit. Merging equal
  // lists saves 3 * 358 + unit; merging different ones adds 2 list tiles to both M-tiles and saves 358 + unit.
  input_.options.cost = {1024, 2048, 358, 1024};
  unite();
  ASSERT_EQ(lists_.units.size(), 3U);
  EXPECT_EQ(lists_.units[0].q_len, 64);
  EXPECT_EQ(lists_.units[1].q_len, 32);
  EXPECT_EQ(lists_.units[1].causal_shift, 64);
  EXPECT_DOUBLE_EQ(lists_.chunk_stats[0].union_inflation(), 1.0);
  input_.options.cost.unit =
      2 * 2 * 1024 - 358;  // a unit saved now pays for two list tiles in two M-tiles: a tie merges
  unite();
  EXPECT_EQ(lists_.units.size(), 2U);
  input_.options.cost.unit -= 1;
  unite();
  EXPECT_EQ(lists_.units.size(), 3U);
}

// Heads 0 and 1 want other pages than heads 2 and 3: two lists of two heads are cheaper than one of four.
TEST_F(Union, CheapestHeadsSplitsAGroupThatDisagrees) {
  input_.num_q_heads = 4;
  input_.num_kv_heads = 1;
  chunk(1024, 128);
  mask(4, 32);
  for (std::int32_t block = 0; block < 4; ++block) {
    for (std::int32_t j = 0; j < 30; ++j) {
      want(0, block, j);
      want(1, block, j);
      want(2, block, 30 + j);
      want(3, block, 30 + j);
    }
  }
  input_.options.mode = UnionMode::kAdaptive;
  unite();
  EXPECT_EQ(lists_.heads_per_unit, 4);
  EXPECT_DOUBLE_EQ(lists_.chunk_stats[0].union_inflation(), 2.0);
  input_.options.heads_per_unit = kCheapestHeads;
  unite();
  EXPECT_EQ(lists_.heads_per_unit, 2);
  EXPECT_EQ(lists_.units.size(), 2U);
  EXPECT_DOUBLE_EQ(lists_.chunk_stats[0].union_inflation(), 1.0);
}

TEST_F(Union, PrioritiesOrderThePastPagesAndDroppedPagesAreTheRest) {
  chunk(112, 32);  // seven past pages; two query blocks
  input_.num_q_heads = 2;
  input_.num_kv_heads = 1;
  input_.forced = {16, 0};
  input_.options.list_dropped = true;
  mask(2);
  std::vector<std::uint8_t> priority(mask_.words.size() * 64,
                                     200);  // a page that a row does not want counts for nothing
  const auto want_at = [&](std::int32_t head, std::int32_t block, std::int32_t page, std::uint8_t value) {
    want(head, block, page);
    priority[static_cast<std::size_t>((head * 2 + block) * 64 + page)] = value;
  };
  want_at(0, 0, 2, 10);
  want_at(1, 1, 2, 90);  // the larger counts
  want_at(0, 0, 1, 50);
  want_at(1, 0, 5, 50);
  want_at(0, 1, 6, 91);
  want_at(0, 1, 0, 1);  // forced: first
  input_.page_priority = priority;
  unite();
  EXPECT_THAT(pages(0), ElementsAre(0, 6, 2, 1, 5, 7, 8));
  EXPECT_THAT(lists_.page_ids, ElementsAre(100, 94, 98, 99, 95, 93, 92));
  ASSERT_EQ(lists_.dropped.size(), 1U);
  EXPECT_THAT(lists_.dropped_ids, ElementsAre(97, 96));
  priority.pop_back();
  input_.page_priority = priority;
  EXPECT_THAT(error(), HasSubstr("255 page priorities; allowed: none, or 256 as the mask has bits"));
}

TEST(UnionMode, HasNames) {
  for (const UnionMode mode : {UnionMode::kPaper, UnionMode::kSpan, UnionMode::kTile, UnionMode::kAdaptive}) {
    EXPECT_EQ(union_mode_from_name(union_mode_name(mode)).value(), mode);
  }
  EXPECT_STREQ(union_mode_name(static_cast<UnionMode>(9)), "unknown");
  EXPECT_THAT(union_mode_from_name("rows").status().message(),
              HasSubstr("'rows'; allowed: paper, span, tile, adaptive"));
}

TEST(DefaultHeadsPerUnit, LargestDivisorUpToFour) {
  std::vector<std::int32_t> heads;
  for (std::int32_t group = 1; group <= 16; ++group) heads.push_back(default_heads_per_unit(group));
  EXPECT_THAT(heads, ElementsAreArray({1, 2, 3, 4, 5, 3, 7, 4, 3, 2, 11, 4, 13, 2, 3, 4}));
  EXPECT_EQ(default_heads_per_unit(25), 25);  // no divisor between 2 and 4: sharing is what the method lives on
}

TEST_F(Union, BadShapesAreNamed) {
  chunk(70, 20);
  mask(4);
  const UnionInput good = input_;
  const auto expect = [&](auto&& spoil, const std::string& message) {
    input_ = good;
    spoil(input_);
    EXPECT_THAT(error(), HasSubstr(message));
    EXPECT_THAT(build_dense_lists(input_, lists_).message(), HasSubstr(message));
    input_ = good;
  };
  expect([](UnionInput& in) { in.num_kv_heads = 0; }, "4 query heads and 0 KV heads");
  expect([](UnionInput& in) { in.num_kv_heads = 3; }, "4 query heads and 3 KV heads");
  expect([](UnionInput& in) { in.page_tokens = 0; }, "page_tokens is 0");
  expect([](UnionInput& in) { in.forced.sink_tokens = -1; }, "-1 sink and 0 window tokens");
  expect([](UnionInput& in) { in.forced.window_tokens = -1; }, "0 sink and -1 window tokens");
  expect([](UnionInput& in) { in.options.heads_per_unit = 3; },
         "heads_per_unit is 3; allowed: 0 (default), a divisor of G = 2, or -1 in mode adaptive");
  expect([](UnionInput& in) { in.options.heads_per_unit = -1; }, "heads_per_unit is -1");
  expect([](UnionInput& in) { in.options.mode = static_cast<UnionMode>(4); }, "mode is 4; allowed: 0 to 3");
  expect([](UnionInput& in) { in.options.mode = UnionMode::kSpan; }, "span_tokens is 0; allowed: 1 or more");
  expect([](UnionInput& in) { in.options.max_inflation_1024ths = 1023; }, "max_inflation_1024ths is 1023");
  expect([](UnionInput& in) { in.options.cost.list_tile = -5; }, "the cost model holds -5; allowed: 0 to 16777216");
  expect([](UnionInput& in) { in.num_physical_pages = 97; }, "chunk 0: page table entry 0 is 100; allowed: 0..96");
  table_[5] = -1;
  expect([](UnionInput&) {}, "page table entry 5 is -1; allowed: 0..100");
  chunks_[0].page_table = nullptr;
  expect([](UnionInput&) {}, "chunk 0 has no page table");
  chunks_[0].chunk_start = -1;
  expect([](UnionInput&) {}, "from position -1");
}

TEST_F(Union, MaskThatDoesNotFitIsNamed) {
  chunk(70, 20);
  chunk(64, 5);
  mask(4);
  const BlockMask good = mask_;
  const auto expect = [&](auto&& spoil, const std::string& message) {
    mask_ = good;
    spoil(mask_);
    EXPECT_THAT(error(), HasSubstr(message));
  };
  expect([](BlockMask& m) { m.mask_heads = 3; },
         "the mask has 3 heads; allowed: 4 (per query head) or 2 (per KV head)");
  expect([](BlockMask& m) { m.words.pop_back(); }, "the mask has 11 words");
  expect([](BlockMask& m) { m.words_per_row = 0, m.words.clear(); },
         "mask rows have 0 words; chunk 0 has 4 past pages");
  expect([](BlockMask& m) { m.blocks.pop_back(), m.words.resize(8); }, "end before chunk 1, position 64");
  expect([](BlockMask& m) { m.blocks.push_back(m.blocks[0]), m.words.resize(16); },
         "has 4 query blocks; the chunks have 3");
  expect([](BlockMask& m) { m.blocks[1].first_position = 81; }, "query block 1");
  expect([](BlockMask& m) { m.blocks[1].q_begin = 0; }, "query block 1");
  expect([](BlockMask& m) { m.blocks[1].tokens = 0; }, "query block 1");
  expect([](BlockMask& m) { m.blocks[1].tokens = 11; }, "query block 1");
  expect([](BlockMask& m) { m.blocks[2].chunk = 0; }, "query block 2");
  expect([](BlockMask& m) { m.row(3, 1)[0] = 0x10; }, "(head 3, query block 1) names a page that is not past");
}

}  // namespace
}  // namespace compact
