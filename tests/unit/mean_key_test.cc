// The mean-key rule on values worked by hand, for the reference and the CPU form alike.
#include "src/select/mean_key.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "tests/unit/select_step.h"

namespace compact {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::pages_of_row;
using testing::SelectStep;
using testing::StepSpec;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Form {
  const char* name;
  Status (*select)(const SelectInput&, const MeanKeyOptions&, BlockMask&);
};

class MeanKey : public ::testing::TestWithParam<Form> {
 protected:
  BlockMask select(const SelectInput& input, const MeanKeyOptions& options) {
    BlockMask mask;
    const Status status = GetParam().select(input, options, mask);
    EXPECT_TRUE(status.ok()) << status.message();
    return mask;
  }
  void expect_error(const SelectInput& input, const MeanKeyOptions& options, const std::string& message) {
    BlockMask mask;
    const Status status = GetParam().select(input, options, mask);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr(message));
  }
};

INSTANTIATE_TEST_SUITE_P(
    Forms, MeanKey,
    ::testing::Values(Form{"reference",
                           [](const SelectInput& input, const MeanKeyOptions& options, BlockMask& mask) {
                             return select_mean_key_reference(input, options, mask);
                           }},
                      Form{"cpu",
                           [](const SelectInput& input, const MeanKeyOptions& options, BlockMask& mask) {
                             ThreadPool pool(2);
                             return select_mean_key_cpu(input, options, mask, pool);
                           }}),
    [](const ::testing::TestParamInfo<Form>& test) { return std::string(test.param.name); });

// One query head of dimension 1 with q = 1, so that the score of page j is its mean: log of the weight wanted.
class OneHead {
 public:
  OneHead(std::int32_t start, std::int32_t tokens, const std::vector<double>& weights)
      : step_({.q_heads = 1, .kv_heads = 1, .head_dim = 1, .page_tokens = 4, .chunks = {{start, tokens}}}) {
    for (std::int32_t t = 0; t < tokens; ++t) *step_.query(0, t, 0) = 1;
    for (std::size_t j = 0; j < weights.size(); ++j) {
      *step_.mean(0, static_cast<std::int32_t>(j), 0) = static_cast<float>(std::log(weights[j]));
    }
  }
  SelectStep& operator*() { return step_; }
  SelectStep* operator->() { return &step_; }

 private:
  SelectStep step_;
};

MeanKeyOptions share(float value, RowVote vote = RowVote::kMean) {
  return {.visible = PageVisibility::kLast, .vote = vote, .share = value};
}
MeanKeyOptions alpha(float value, ScoreNorm norm = ScoreNorm::kTile, PageVisibility visible = PageVisibility::kLast) {
  return {.visible = visible, .norm = norm, .vote = RowVote::kMean, .alpha = value};
}

TEST_P(MeanKey, ShareIsPartOfTheSoftmaxOverPages) {
  OneHead step(12, 2, {1, 5, 4});  // shares .1, .5, .4; the chunk's page is incomplete
  EXPECT_THAT(pages_of_row(select(step->select_input(), share(0.05F)), 0, 0), ElementsAre(0, 1, 2));
  EXPECT_THAT(pages_of_row(select(step->select_input(), share(0.2F)), 0, 0), ElementsAre(1, 2));
  EXPECT_THAT(pages_of_row(select(step->select_input(), share(0.45F)), 0, 0), ElementsAre(1));
  EXPECT_THAT(pages_of_row(select(step->select_input(), share(0.6F)), 0, 0), IsEmpty());
}

TEST_P(MeanKey, AlphaIsPartOfTheLargestEnergy) {
  OneHead step(12, 2, {1, 5, 4});  // .2, 1, .8 of the largest
  for (const ScoreNorm norm : {ScoreNorm::kRow, ScoreNorm::kTile}) {
    EXPECT_THAT(pages_of_row(select(step->select_input(), alpha(0.19F, norm)), 0, 0), ElementsAre(0, 1, 2));
    EXPECT_THAT(pages_of_row(select(step->select_input(), alpha(0.5F, norm)), 0, 0), ElementsAre(1, 2));
    EXPECT_THAT(pages_of_row(select(step->select_input(), alpha(1.0F, norm)), 0, 0), ElementsAre(1));
  }
}

TEST_P(MeanKey, PagesOfTheChunkTakePartInTheNormaliserOnly) {
  // Chunk 8..15 is two tiles of 4 tokens. The first tile's last query (11) completes page 2; under `last` only that one
  // of its four rows sees it. Weights 1, 1 | 6.
  OneHead step(8, 8, {1, 1, 6, 1});
  // First tile: rows 8..10 give page 0 a share of 1/2, row 11 gives 1/8: mean 13/32 = .40625.
  EXPECT_THAT(pages_of_row(select(step->select_input(), share(0.40F)), 0, 0), ElementsAre(0, 1));
  EXPECT_THAT(pages_of_row(select(step->select_input(), share(0.41F)), 0, 0), IsEmpty());
  // Second tile: 1/8 for rows 12..14, 1/9 for row 15: mean .12153.
  EXPECT_THAT(pages_of_row(select(step->select_input(), share(0.121F)), 0, 1), ElementsAre(0, 1));
  EXPECT_THAT(pages_of_row(select(step->select_input(), share(0.122F)), 0, 1), IsEmpty());
  // Tile norm, `last`: E = 4, 4, 6: pages 0 and 1 have 2/3 of the largest. `first`: all rows see page 2: 1/6.
  EXPECT_THAT(pages_of_row(select(step->select_input(), alpha(0.66F)), 0, 0), ElementsAre(0, 1));
  EXPECT_THAT(pages_of_row(select(step->select_input(), alpha(0.67F)), 0, 0), IsEmpty());
  EXPECT_THAT(pages_of_row(select(step->select_input(), alpha(0.16F, ScoreNorm::kTile, PageVisibility::kFirst)), 0, 0),
              ElementsAre(0, 1));
  EXPECT_THAT(pages_of_row(select(step->select_input(), alpha(0.17F, ScoreNorm::kTile, PageVisibility::kFirst)), 0, 0),
              IsEmpty());
}

TEST_P(MeanKey, ChunkPageWithoutACompleteSummaryIsNotScored) {
  OneHead step(8, 4, {1, 1, 6});
  EXPECT_THAT(pages_of_row(select(step->select_input(), share(0.45F)), 0, 0), IsEmpty());
  step->count(0, 2) = 3;
  EXPECT_THAT(pages_of_row(select(step->select_input(), share(0.45F)), 0, 0), ElementsAre(0, 1));
}

TEST_P(MeanKey, RowNormGivesEachRowOneVoteTileNormDoesNot) {
  // Two heads of a KV head: head 0 wants page 0 with scores 10 : 0, head 1 page 1 with 0 : 1.
  SelectStep step({.q_heads = 2, .kv_heads = 1, .head_dim = 2, .page_tokens = 4, .chunks = {{8, 1}}});
  const float q[2][2] = {{10, 0}, {0, 1}};
  const float mean[2][2] = {{1, 0}, {0, 1}};
  for (std::int32_t i = 0; i < 2; ++i) {
    std::copy_n(q[i], 2, step.query(0, 0, i));
    std::copy_n(mean[i], 2, step.mean(0, i, 0));
  }
  // Row norm: E[1] = (e^-10 + e/(1+e)) / 2 = .366. Tile norm: E = 1 + e^-10, E[1] = e^-10 + e^-9.
  EXPECT_THAT(pages_of_row(select(step.select_input(), share(0.36F)), 0, 0), ElementsAre(0, 1));
  EXPECT_THAT(pages_of_row(select(step.select_input(), share(0.37F)), 0, 0), ElementsAre(0));
  EXPECT_THAT(pages_of_row(select(step.select_input(), alpha(0.001F)), 0, 0), ElementsAre(0));
  EXPECT_THAT(pages_of_row(select(step.select_input(), alpha(0.00016F)), 0, 0), ElementsAre(0, 1));
  // Tiles per head keep the two apart.
  MeanKeyOptions per_head = alpha(0.5F);
  per_head.tile = TileShape::kPerHead;
  const BlockMask mask = select(step.select_input(), per_head);
  ASSERT_EQ(mask.mask_heads, 2);
  EXPECT_THAT(pages_of_row(mask, 0, 0), ElementsAre(0));
  EXPECT_THAT(pages_of_row(mask, 1, 0), ElementsAre(1));
}

TEST_P(MeanKey, VoteMaxHearsOneRowAmongMany) {
  // Four rows of a tile; the last asks for page 0 with a share of 0.9, the others have 0.1 for it.
  SelectStep step({.q_heads = 1, .kv_heads = 1, .head_dim = 2, .page_tokens = 4, .chunks = {{8, 4}}});
  for (std::int32_t t = 0; t < 4; ++t) {
    step.query(0, t, 0)[0] = t == 3 ? 1 : 0;
    step.query(0, t, 0)[1] = t == 3 ? 0 : 1;
  }
  const float score = std::log(9.0F) / step.select_input().softmax_scale;
  const float mean[3][2] = {{score, 0}, {0, score}, {-100, -100}};
  for (std::int32_t j = 0; j < 3; ++j) std::copy_n(mean[j], 2, step.mean(0, j, 0));
  EXPECT_THAT(pages_of_row(select(step.select_input(), share(0.31F, RowVote::kMean)), 0, 0), ElementsAre(1));
  EXPECT_THAT(pages_of_row(select(step.select_input(), share(0.89F, RowVote::kMax)), 0, 0), ElementsAre(0, 1));
  EXPECT_THAT(pages_of_row(select(step.select_input(), share(0.91F, RowVote::kMax)), 0, 0), IsEmpty());
  // Tile norm: the largest weight of a page relative to the tile's largest score; both pages reach it.
  MeanKeyOptions tile = alpha(1.0F);
  tile.vote = RowVote::kMax;
  EXPECT_THAT(pages_of_row(select(step.select_input(), tile), 0, 0), ElementsAre(0, 1));
  tile.vote = RowVote::kMean;
  EXPECT_THAT(pages_of_row(select(step.select_input(), tile), 0, 0), ElementsAre(1));
}

TEST_P(MeanKey, VisibleFullLeavesOutThePageOfTheTile) {
  // The tile 8..11 completes page 2, whose weight is 98 of 100: under `last` its last row has nothing left for pages
  // 0, 1.
  OneHead step(8, 4, {1, 1, 98});
  MeanKeyOptions options = share(0.4F, RowVote::kMax);
  EXPECT_THAT(pages_of_row(select(step->select_input(), options), 0, 0), ElementsAre(0, 1));  // rows 8..10
  options.vote = RowVote::kMean;
  EXPECT_THAT(pages_of_row(select(step->select_input(), options), 0, 0), IsEmpty());
  options.visible = PageVisibility::kFull;
  EXPECT_THAT(pages_of_row(select(step->select_input(), options), 0, 0), ElementsAre(0, 1));
  // The next tile sees page 2 whole.
  OneHead next(8, 8, {1, 1, 98, 1});
  EXPECT_THAT(pages_of_row(select(next->select_input(), options), 0, 1), IsEmpty());
}

TEST_P(MeanKey, EachKvHeadHasItsOwnMeans) {
  SelectStep step({.q_heads = 2, .kv_heads = 2, .head_dim = 1, .page_tokens = 4, .chunks = {{8, 1}}});
  for (std::int32_t g = 0; g < 2; ++g) {
    *step.query(0, 0, g) = 1;
    *step.mean(0, 0, g) = g == 0 ? 5.0F : 0.0F;
    *step.mean(0, 1, g) = g == 0 ? 0.0F : 5.0F;
  }
  const BlockMask mask = select(step.select_input(), share(0.5F));
  EXPECT_THAT(pages_of_row(mask, 0, 0), ElementsAre(0));
  EXPECT_THAT(pages_of_row(mask, 1, 0), ElementsAre(1));
}

TEST_P(MeanKey, NoPastPageSelectsNothing) {
  OneHead step(3, 6, {1, 1});  // the boundary page is not past
  const BlockMask mask = select(step->select_input(), share(0.0F));
  EXPECT_EQ(mask.words_per_row, 0);
  EXPECT_EQ(mask.blocks.size(), 3U);
}

TEST_P(MeanKey, ThresholdZeroKeepsUnderflowedPages) {
  OneHead step(12, 2, {1, 1, 1});
  *step->mean(0, 0, 0) = -1e30F;
  EXPECT_THAT(pages_of_row(select(step->select_input(), share(1e-30F)), 0, 0), ElementsAre(1, 2));
  EXPECT_THAT(pages_of_row(select(step->select_input(), share(0.0F)), 0, 0), ElementsAre(0, 1, 2));
  EXPECT_THAT(pages_of_row(select(step->select_input(), share(-1.0F)), 0, 0), ElementsAre(0, 1, 2));
  EXPECT_THAT(pages_of_row(select(step->select_input(), alpha(0.0F)), 0, 0), ElementsAre(0, 1, 2));
}

TEST_P(MeanKey, NonFiniteRowsKeepAllPagesAndAreCounted) {
  for (const float bad : {kNaN, kInf}) {
    OneHead step(12, 8, {1, 5, 4, 1, 1});  // tiles 12..15 and 16..19
    *step->query(0, 1, 0) = bad;
    const BlockMask mask = select(step->select_input(), share(0.4F));
    EXPECT_EQ(mask.nonfinite_rows, 1);
    EXPECT_THAT(pages_of_row(mask, 0, 0), ElementsAre(0, 1, 2));
    EXPECT_THAT(pages_of_row(mask, 0, 1), ElementsAre(1));
  }
}

TEST_P(MeanKey, NegativeInfinityIsAScoreUnlessItIsTheOnlyOne) {
  OneHead step(12, 2, {1, 5, 4});
  *step->mean(0, 0, 0) = -kInf;
  BlockMask mask = select(step->select_input(), share(0.01F));
  EXPECT_EQ(mask.nonfinite_rows, 0);
  EXPECT_THAT(pages_of_row(mask, 0, 0), ElementsAre(1, 2));
  *step->mean(0, 1, 0) = -kInf;
  *step->mean(0, 2, 0) = -kInf;
  mask = select(step->select_input(), share(0.01F));
  EXPECT_EQ(mask.nonfinite_rows, 2);
  EXPECT_THAT(pages_of_row(mask, 0, 0), ElementsAre(0, 1, 2));
}

TEST_P(MeanKey, MissingOrStaleSummaryIsAnErrorThatNamesThePage) {
  for (const std::int32_t count : {0, 3, 5}) {
    OneHead step(12, 2, {1, 5, 4});
    step->count(0, 1) = count;
    for (const float threshold : {0.0F, 0.1F}) {
      expect_error(step->select_input(), share(threshold),
                   "past page 1 (physical " + std::to_string(step->table_entry(0, 1)) + ") covers " +
                       std::to_string(count) + " tokens, not 4");
    }
  }
}

TEST_P(MeanKey, BadInputIsNamed) {
  OneHead step(12, 2, {1, 5, 4});
  const auto expect = [&](const std::function<void(SelectInput&)>& spoil, const std::string& message) {
    SelectInput input = step->select_input();
    spoil(input);
    expect_error(input, share(0.1F), message);
  };
  expect([](SelectInput& in) { in.summaries.num_kv_heads = 0; }, "1 query heads and 0 KV heads");
  expect([](SelectInput& in) { in.summaries.num_kv_heads = 2; }, "1 query heads and 2 KV heads");
  expect([](SelectInput& in) { in.summaries.head_dim = 2; }, "head dimension 1 in Q and 2");
  expect([](SelectInput& in) { in.summaries.mean_k = nullptr; }, "no page means");
  expect([](SelectInput& in) { in.summaries.count = nullptr; }, "no page means");
  expect([](SelectInput& in) { in.q.data = nullptr; }, "Q is null");
  expect([](SelectInput& in) { in.softmax_scale = 0; }, "softmax_scale is 0");
  expect([](SelectInput& in) { in.softmax_scale = kNaN; }, "softmax_scale is nan");
  step->table_entry(0, 3) = 99;
  expect([](SelectInput&) {}, "page table entry 3 is 99; allowed: 0..6");
  step->table_entry(0, 3) = -1;
  expect([](SelectInput&) {}, "page table entry 3 is -1");
  step->chunks()[0].page_table = nullptr;
  expect([](SelectInput&) {}, "chunk 0 has no page table");
}

TEST_P(MeanKey, BadOptionIsNamed) {
  OneHead step(12, 2, {1, 5, 4});
  expect_error(step->select_input(), share(kNaN), "share is nan");
  expect_error(step->select_input(), share(1.5F), "share is 1.5");
  expect_error(step->select_input(), alpha(kNaN), "alpha is nan");
  expect_error(step->select_input(), alpha(1.5F), "alpha is 1.5");
  expect_error(step->select_input(), alpha(-1.0F), "tile norm has no shares");
}

TEST_P(MeanKey, ZeroTokensIsSuccess) {
  SelectStep step({.page_tokens = 4, .chunks = {{8, 0}}});
  step.chunks()[0].page_table = nullptr;
  EXPECT_TRUE(select(step.select_input(), share(0.1F)).blocks.empty());
  SelectInput none = step.select_input();
  none.chunks = {};
  EXPECT_TRUE(select(none, share(0.1F)).blocks.empty());
}

TEST(MeanKeyReference, ReportsEnergiesAndMargins) {
  OneHead step(12, 2, {1, 5, 4});
  BlockMask mask;
  std::vector<double> energies;
  std::vector<double> margins;
  ASSERT_TRUE(select_mean_key_reference(step->select_input(), share(0.25F), mask, &energies, &margins).ok());
  ASSERT_EQ(energies.size(), 64U);
  EXPECT_NEAR(energies[0], 0.1, 1e-6);
  EXPECT_NEAR(margins[1], 0.5 / 0.25 - 1, 1e-5);
  EXPECT_TRUE(std::isnan(margins[3]));
}

TEST(MeanKeySelector, RefusesBadOptionsWhenMade) {
  EXPECT_THAT(make_selector({.name = "mean-key", .mean_key = share(2)}).status().message(), HasSubstr("share is 2"));
}

}  // namespace
}  // namespace compact
