// QUOKA's page scores on the CPU against loops over tokens in fp64, on every instruction set that this machine runs.
#include "src/select/quoka.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "tests/cross_backend/targets.h"
#include "tests/kv_step.h"

namespace compact {
namespace {

using ::testing::HasSubstr;
using testing::KvStep;
using testing::KvStepSpec;
using testing::machine_targets;
using testing::OneTarget;
using testing::pages_of_row;
using testing::random_kv_step;

KvStepSpec with_norms(KvStepSpec spec) {
  spec.summaries = {.norm_k = true};
  return spec;
}

std::vector<QueryBlock> blocks_of(const SelectInput& input) {
  return make_query_blocks(input.chunks, quoka_block_tokens(input.page_tokens));
}

TEST(QuokaBackends, ScoresEqualTheReference) {
  ThreadPool pool(2);
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    const KvStep step(with_norms(random_kv_step(seed)));
    const SelectInput input = step.select_input();
    // 40 queries of a block: three blocks share a tile, and short blocks give all theirs.
    const QuokaOptions options{.picked_queries = seed % 3 == 0 ? 1 : seed % 3 == 1 ? 16 : 40};
    const std::vector<QueryBlock> blocks = blocks_of(input);
    QuokaScores reference;
    ASSERT_TRUE(quoka_scores_reference(input, options, blocks, reference).ok());
    for (const std::int64_t target : machine_targets()) {
      const OneTarget one(target);
      QuokaScores scores;
      const Status status = quoka_scores_cpu(input, options, blocks, scores, pool);
      ASSERT_TRUE(status.ok()) << status.message();
      ASSERT_EQ(scores.scores.size(), reference.scores.size());
      EXPECT_EQ(scores.nonfinite, reference.nonfinite);
      for (std::size_t at = 0; at < scores.scores.size(); ++at) {
        ASSERT_NEAR(scores.scores[at], reference.scores[at], 1e-6F)
            << hwy::TargetName(target) << " seed " << seed << " " << step.spec().describe() << ", row "
            << at / static_cast<std::size_t>(scores.row_pages) << " page "
            << at % static_cast<std::size_t>(scores.row_pages);
        ASSERT_LE(scores.scores[at], 1.0F + 1e-6F);
      }
    }
  }
}

TEST(QuokaBackends, NonFiniteQueriesKeepTheirBlock) {
  KvStep step(with_norms({.q_heads = 4, .kv_heads = 2, .page_tokens = 16, .chunks = {{60, 50, 2}}}));
  step.query(0, 20, 1)[3] = std::numeric_limits<float>::quiet_NaN();  // position 80: block number 2 of the chunk
  const SelectInput input = step.select_input();
  const std::vector<QueryBlock> blocks = blocks_of(input);
  QuokaScores reference;
  QuokaScores scores;
  ThreadPool pool(2);
  ASSERT_TRUE(quoka_scores_reference(input, {}, blocks, reference).ok());
  ASSERT_TRUE(quoka_scores_cpu(input, {}, blocks, scores, pool).ok());
  EXPECT_EQ(scores.nonfinite, reference.nonfinite);
  EXPECT_EQ(scores.nonfinite[2], 1);

  BlockMask mask;
  const auto selector = make_selector({.name = "quoka", .quoka = {.kept_tokens = 16}}).value();
  ASSERT_TRUE(selector->select(input, mask, pool).ok());
  EXPECT_EQ(mask.nonfinite_rows, 1);
  EXPECT_EQ(pages_of_row(mask, 0, 2).size(), 3U) << "all past pages";
  EXPECT_EQ(pages_of_row(mask, 0, 1).size(), 1U);
  EXPECT_EQ(pages_of_row(mask, 1, 2).size(), 1U) << "the other KV head";
}

TEST(Quoka, KeepsPagesUntilTheTokensAreThere) {
  const KvStep step(with_norms({.page_tokens = 16, .chunks = {{160, 40, 3}}}));
  SelectInput input = step.select_input();
  ThreadPool pool(1);
  BlockMask mask;
  for (const std::int32_t kept_tokens : {1, 16, 17, 96, 160, 100000}) {
    SelectorOptions options{.name = "quoka", .quoka = {.kept_tokens = kept_tokens}};
    ASSERT_TRUE(make_selector(options).value()->select(input, mask, pool).ok());
    EXPECT_EQ(pages_of_row(mask, 0, 1).size(),
              std::min<std::size_t>(10, (static_cast<std::size_t>(kept_tokens) + 15) / 16));
    options.budget.min_pages = 2;
    ASSERT_TRUE(make_selector(options).value()->select(input, mask, pool).ok());
    EXPECT_GE(pages_of_row(mask, 0, 1).size(), 2U);
  }
}

TEST(Quoka, BadOptionsAndMissingNormsAreNamed) {
  EXPECT_THAT(make_selector({.name = "quoka", .quoka = {.picked_queries = 0}}).status().message(),
              HasSubstr("picked_queries is 0"));
  EXPECT_THAT(make_selector({.name = "quoka", .quoka = {.kept_tokens = -1}}).status().message(),
              HasSubstr("kept_tokens is -1"));
  EXPECT_THAT(make_selector({.name = "quoka", .budget = {.kind = BudgetKind::kMass, .value = 0.5F}}).status().message(),
              HasSubstr("any budget but a mass"));
  const KvStep step({.page_tokens = 16, .chunks = {{60, 50, 2}}});
  BlockMask mask;
  ThreadPool pool(1);
  EXPECT_THAT(make_selector({.name = "quoka"}).value()->select(step.select_input(), mask, pool).message(),
              HasSubstr("the cache keeps no key norms"));
}

}  // namespace
}  // namespace compact
