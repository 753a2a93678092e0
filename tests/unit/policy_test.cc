#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "compact/attention.h"

namespace compact {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(UnitCost, IsTheFormulaOfTheDesignAtPagesOf128) {
  // One tile of 32 tokens x 4 heads, 10 pages: (10 + 2) * 1024 + 10 * 358 + 1024.
  EXPECT_EQ(unit_cost(CostModel(), 32, 4, 10, 128), 12 * 1024 + 3580 + 1024);
  // 1024 tokens x 4 heads: 32 M-tiles.
  EXPECT_EQ(unit_cost(CostModel(), 1024, 4, 10, 128), 32 * 12 * 1024 + 3580 + 1024);
  // A short tile costs a whole one.
  EXPECT_EQ(unit_cost(CostModel(), 1, 4, 10, 128), unit_cost(CostModel(), 32, 4, 10, 128));
  EXPECT_EQ(unit_cost(CostModel(), 33, 4, 10, 128), 2 * 12 * 1024 + 3580 + 1024);
}

TEST(UnitCost, PacksThePowerOfTwoThatDividesTheHeads) {
  EXPECT_EQ(unit_cost(CostModel(), 128, 7, 1, 128), 7 * 3 * 1024 + 358 + 1024);      // 7 x (128 tokens x 1 head)
  EXPECT_EQ(unit_cost(CostModel(), 128, 6, 1, 128), 3 * 2 * 3 * 1024 + 358 + 1024);  // 3 x 2 x (64 tokens x 2 heads)
  EXPECT_EQ(unit_cost(CostModel(), 1, 256, 1, 128), 3 * 1024 + 358 + 1024);          // more heads than rows of a tile
}

TEST(UnitCost, OtherPageSizesPayByTheToken) {
  EXPECT_EQ(unit_cost(CostModel(), 32, 4, 20, 64), unit_cost(CostModel(), 32, 4, 10, 128));
  EXPECT_EQ(unit_cost(CostModel(), 32, 4, 80, 16), unit_cost(CostModel(), 32, 4, 10, 128));
  EXPECT_EQ(unit_cost(CostModel(), 32, 4, 5, 256), unit_cost(CostModel(), 32, 4, 10, 128));
  EXPECT_EQ(unit_cost(CostModel(), 32, 4, 1, 16), 128 + 2048 + 44 + 1024);
}

TEST(UnitCost, EmptyUnitIsFree) { EXPECT_EQ(unit_cost(CostModel(), 0, 4, 10, 128), 0); }

nlohmann::json recorded(const std::string& name) {
  std::ifstream file(std::string(COMPACT_SOURCE_DIR) + "/benchmarks/results/" + name);
  return nlohmann::json::parse(file);
}

// No constant of the CPU backend's policy is typed by hand: they are what the recorded runs found.
TEST(RecordedFigures, AreTheConstantsInUse) {
  const nlohmann::json fit = recorded("cost_model_cpu.json")["cost_model"];
  const CostModel cost = cpu_cost_model(CpuKernel::kF32);
  EXPECT_EQ(cost.tile, fit["tile"]);
  EXPECT_EQ(cost.m_tile, fit["m_tile"]);
  EXPECT_EQ(cost.list_tile, fit["list_tile"]);
  EXPECT_EQ(cost.unit, fit["unit"]);
  EXPECT_EQ(CrossoverPolicy().min_context_tokens, recorded("step_cpu.json")["pays_from_tokens"]);
}

TEST(CrossoverBefore, FirstChunkThenShortContext) {
  const CrossoverPolicy policy{.min_context_tokens = 2048};
  const auto decide = [&](std::int32_t start, std::int32_t tokens) {
    return crossover_before_selection(policy, {0, tokens, start, nullptr}, 128);
  };
  EXPECT_EQ(decide(0, 4096), DenseReason::kFirstChunk);
  EXPECT_EQ(decide(127, 4096), DenseReason::kFirstChunk);  // no complete page
  EXPECT_EQ(decide(128, 1919), DenseReason::kShortContext);
  EXPECT_EQ(decide(128, 1920), DenseReason::kNone);
  EXPECT_EQ(decide(1 << 20, 1), DenseReason::kNone);
}

TEST(DenseReasonName, NamesAll) {
  std::vector<std::string> names;
  for (std::int32_t i = 0; i < kNumDenseReasons; ++i)
    names.emplace_back(dense_reason_name(static_cast<DenseReason>(i)));
  EXPECT_THAT(names, ElementsAre("none", "selector", "first_chunk", "short_context", "high_density", "requested"));
  EXPECT_STREQ(dense_reason_name(static_cast<DenseReason>(99)), "unknown");
}

// Chunks of 128 tokens after 100 pages; the mask of chunk b keeps the first keep[b] past pages.
class CrossoverAfter : public ::testing::Test {
 protected:
  void build(const std::vector<std::int32_t>& keep) {
    table_.resize(101);
    std::iota(table_.begin(), table_.end(), 7);
    chunks_.clear();
    for (std::size_t b = 0; b < keep.size(); ++b) {
      chunks_.push_back({static_cast<std::int32_t>(b) * 128, 128, 12800, table_.data()});
    }
    input_.chunks = chunks_;
    input_.num_q_heads = 8;
    input_.num_kv_heads = 2;
    input_.page_tokens = 128;
    input_.num_physical_pages = 200;
    input_.forced = {0, 0};
    BlockMask mask;
    mask.reset(2, 128, chunks_, make_query_blocks(chunks_, 128));
    for (std::int32_t head = 0; head < 2; ++head) {
      for (std::int32_t b = 0; b < static_cast<std::int32_t>(keep.size()); ++b) {
        for (std::int32_t j = 0; j < keep[static_cast<std::size_t>(b)]; ++j) {
          mask.row(head, b)[j / 64] |= std::uint64_t{1} << (j % 64);
        }
      }
    }
    ThreadPool pool(1);
    ASSERT_TRUE(build_page_lists(input_, mask, lists_, pool).ok());
  }

  std::vector<std::int32_t> table_;
  std::vector<ChunkView> chunks_;
  UnionInput input_;
  PageLists lists_;
};

TEST_F(CrossoverAfter, RewritesOnlyTheChunksThatDoNotPay) {
  build({10, 95, 20});
  const PageLists before = lists_;
  std::vector<DenseReason> reasons(3, DenseReason::kNone);
  ASSERT_TRUE(crossover_after_union({}, input_, lists_, reasons).ok());
  EXPECT_THAT(reasons, ElementsAre(DenseReason::kNone, DenseReason::kHighDensity, DenseReason::kNone));
  ASSERT_EQ(lists_.units.size(), 6U);
  for (std::size_t u = 0; u < 6; ++u) {
    const AttentionUnit& unit = lists_.units[u];
    const bool dense = u / 2 == 1;
    const std::int32_t past = dense ? 100 : (u / 2 == 0 ? 10 : 20);
    EXPECT_EQ(unit.past_tokens, past * 128);
    EXPECT_EQ(unit.list_tokens, past * 128 + 128);
    EXPECT_EQ(unit.q_begin, before.units[u].q_begin);
    EXPECT_EQ(unit.q_head, before.units[u].q_head);
    for (std::int32_t k = 0; k <= past; ++k) {
      const std::int32_t page = k == past ? 100 : k;
      EXPECT_EQ(lists_.logical_pages[static_cast<std::size_t>(unit.list_begin + k)], page);
      EXPECT_EQ(lists_.page_ids[static_cast<std::size_t>(unit.list_begin + k)], page + 7);
    }
  }
  EXPECT_EQ(lists_.page_ids.size(), 2U * 11 + 101 + 2U * 21);  // the dense chunk's heads share one list
  EXPECT_DOUBLE_EQ(lists_.chunk_stats[0].density(), 0.1);
  EXPECT_DOUBLE_EQ(lists_.chunk_stats[1].density(), 1.0);
  EXPECT_DOUBLE_EQ(lists_.chunk_stats[1].union_inflation(), 100.0 / 95.0);
}

TEST_F(CrossoverAfter, KeepsTheDroppedPagesOfTheOthers) {
  input_.options.list_dropped = true;
  build({10, 95, 20});
  const PageLists before = lists_;
  std::vector<DenseReason> reasons(3, DenseReason::kNone);
  ASSERT_TRUE(crossover_after_union({}, input_, lists_, reasons).ok());
  ASSERT_EQ(lists_.dropped.size(), 6U);
  for (std::size_t u = 0; u < 6; ++u) {
    const std::int32_t kept = u / 2 == 0 ? 10 : (u / 2 == 1 ? 100 : 20);  // the second chunk runs dense
    ASSERT_EQ(lists_.dropped[u].count, 100 - kept);
    for (std::int32_t k = 0; k < 100 - kept; ++k) {
      EXPECT_EQ(lists_.dropped_ids[static_cast<std::size_t>(lists_.dropped[u].begin + k)], kept + k + 7);
    }
  }
  lists_.dropped.pop_back();
  EXPECT_THAT(crossover_after_union({}, input_, lists_, reasons).message(),
              HasSubstr("dropped pages of 5 units for 6"));
}

TEST_F(CrossoverAfter, ComesAtDensity87AtTheDefaultMargin) {
  for (const std::int32_t keep : {84, 85, 86, 87, 88, 89}) {
    build({keep});
    std::vector<DenseReason> reasons(1, DenseReason::kNone);
    ASSERT_TRUE(crossover_after_union({}, input_, lists_, reasons).ok());
    // 4 M-tiles: 4 (n + 3) 1024 + (n + 1) 358 + 1024 against n = 100.
    const std::int64_t cost = 4 * (keep + 3) * 1024 + (keep + 1) * 358 + 1024;
    const std::int64_t dense = 4 * 103 * 1024 + 101 * 358 + 1024;
    EXPECT_EQ(reasons[0] == DenseReason::kHighDensity, cost * 1178 >= dense * 1024) << keep;
    EXPECT_EQ(reasons[0] == DenseReason::kHighDensity, keep >= 87) << keep;
  }
}

TEST_F(CrossoverAfter, LeavesDecidedChunksAlone) {
  build({100});
  std::vector<DenseReason> reasons(1, DenseReason::kShortContext);
  const auto lists = lists_.page_ids;
  ASSERT_TRUE(crossover_after_union({}, input_, lists_, reasons).ok());
  EXPECT_THAT(reasons, ElementsAre(DenseReason::kShortContext));
  EXPECT_EQ(lists_.page_ids, lists);
}

TEST_F(CrossoverAfter, SkipsEmptyAndFirstChunks) {
  build({10, 10, 10});
  chunks_[0].chunk_tokens = 0;
  chunks_[1].chunk_start = 0;
  input_.forced = {1 << 20, 0};
  BlockMask mask;
  mask.reset(2, 128, chunks_, make_query_blocks(chunks_, 128));
  ThreadPool pool(1);
  ASSERT_TRUE(build_page_lists(input_, mask, lists_, pool).ok());
  std::vector<DenseReason> reasons(3, DenseReason::kNone);
  ASSERT_TRUE(crossover_after_union({}, input_, lists_, reasons).ok());
  EXPECT_THAT(reasons, ElementsAre(DenseReason::kNone, DenseReason::kNone, DenseReason::kHighDensity));
}

TEST_F(CrossoverAfter, BadInputIsNamedAndChangesNothing) {
  build({95});
  std::vector<DenseReason> reasons(2, DenseReason::kNone);
  EXPECT_THAT(crossover_after_union({}, input_, lists_, reasons).message(), HasSubstr("2 reasons"));
  reasons.resize(1);
  lists_.units[1].q_begin = 5000;
  EXPECT_THAT(crossover_after_union({}, input_, lists_, reasons).message(), HasSubstr("unit 1 starts at row 5000"));
  EXPECT_THAT(reasons, ElementsAre(DenseReason::kNone));
  lists_.heads_per_unit = 3;
  EXPECT_THAT(crossover_after_union({}, input_, lists_, reasons).message(), HasSubstr("3 heads per unit"));
}

}  // namespace
}  // namespace compact
