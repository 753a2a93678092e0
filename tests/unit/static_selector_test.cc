#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/unit/select_step.h"

namespace compact {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::pages_of_row;
using testing::SelectStep;

BlockMask select_with(const std::string& name, const SelectInput& input) {
  auto selector = make_selector({.name = name, .mean_key = {}});
  EXPECT_TRUE(selector.ok());
  EXPECT_EQ(selector.value()->name(), name);
  BlockMask mask;
  ThreadPool pool(1);
  const Status status = selector.value()->select(input, mask, pool);
  EXPECT_TRUE(status.ok()) << status.message();
  return mask;
}

TEST(DenseSelector, WantsEveryPastPage) {
  SelectStep step({.page_tokens = 16, .chunks = {{.start = 50, .tokens = 20}, {.start = 0, .tokens = 5}}});
  const BlockMask mask = select_with("dense", step.select_input());
  EXPECT_EQ(mask.mask_heads, 4);
  ASSERT_EQ(mask.blocks.size(), 3U);  // 14 + 6 tokens in pages 3 and 4, then 5 of the other request
  for (std::int32_t head = 0; head < 4; ++head) {
    EXPECT_THAT(pages_of_row(mask, head, 0), ElementsAre(0, 1, 2));
    EXPECT_THAT(pages_of_row(mask, head, 1), ElementsAre(0, 1, 2));
    EXPECT_THAT(pages_of_row(mask, head, 2), IsEmpty());
  }
}

TEST(StaticSelector, WantsNothing) {
  SelectStep step({.page_tokens = 16, .chunks = {{.start = 50, .tokens = 20}}});
  const BlockMask mask = select_with("static", step.select_input());
  EXPECT_EQ(mask.words_per_row, 1);
  for (const std::uint64_t word : mask.words) EXPECT_EQ(word, 0U);
}

TEST(Selectors, NeedPageMeansOnlyForMeanKey) {
  EXPECT_FALSE(make_selector({.name = "dense", .mean_key = {}}).value()->needs().summaries.mean_k);
  EXPECT_FALSE(make_selector({.name = "static", .mean_key = {}}).value()->needs().summaries.mean_k);
  EXPECT_TRUE(make_selector({.name = "mean-key", .mean_key = {}}).value()->needs().summaries.mean_k);
}

TEST(Selectors, UnknownNameListsTheKnown) {
  const auto selector = make_selector({.name = "nonesuch"});
  EXPECT_EQ(selector.status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(selector.status().message(),
            "unknown selector 'nonesuch'; known: dense, static, oracle, mean-key, sub-mean, xattention, quoka, seer, "
            "random, external");
  EXPECT_EQ(selector_names(), "dense, static, oracle, mean-key, sub-mean, xattention, quoka, seer, random, external");
}

TEST(Selectors, PresetsAreTheirPublishedRules) {
  const MeanKeyOptions ours = mean_key_preset("mean-key").value();
  EXPECT_EQ(ours.tile, TileShape::kPacked);
  EXPECT_EQ(ours.norm, ScoreNorm::kRow);
  EXPECT_EQ(ours.vote, RowVote::kMax);
  EXPECT_EQ(ours.visible, PageVisibility::kFull);
  EXPECT_LT(ours.alpha, 0);
  EXPECT_GT(ours.share, 0);
  const MeanKeyOptions compact_rule = mean_key_preset("compact").value();
  EXPECT_EQ(compact_rule.tile, TileShape::kPerHead);
  EXPECT_EQ(compact_rule.norm, ScoreNorm::kTile);
  EXPECT_EQ(compact_rule.vote, RowVote::kMean);
  EXPECT_EQ(compact_rule.visible, PageVisibility::kLast);
  EXPECT_EQ(compact_rule.alpha, 0.06F);
  EXPECT_EQ(mean_key_preset("flashprefill-v1").value().alpha, 0.18F);
  const MeanKeyOptions v2 = mean_key_preset("flashprefill-v2").value();
  EXPECT_EQ(v2.tile, TileShape::kPacked);
  EXPECT_EQ(v2.visible, PageVisibility::kFirst);
  EXPECT_EQ(v2.alpha, 0.1F);
  EXPECT_THAT(mean_key_preset("v3").status().message(),
              HasSubstr("known: mean-key, compact, flashprefill-v1, flashprefill-v2"));
}

struct BadInput {
  const char* name;
  void (*spoil)(SelectInput&, std::vector<ChunkView>&);
  const char* message;
};

class SelectorInput : public ::testing::TestWithParam<BadInput> {};

TEST_P(SelectorInput, IsCheckedByEverySelector) {
  SelectStep step({.page_tokens = 16, .chunks = {{.start = 50, .tokens = 20}}});
  SelectInput input = step.select_input();
  GetParam().spoil(input, step.chunks());
  for (const char* name : {"dense", "static", "mean-key"}) {
    BlockMask mask;
    ThreadPool pool(1);
    const Status status = make_selector({.name = name, .mean_key = {}}).value()->select(input, mask, pool);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << name;
    EXPECT_THAT(status.message(), HasSubstr(GetParam().message)) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, SelectorInput,
    ::testing::Values(
        BadInput{"page", [](SelectInput& in, std::vector<ChunkView>&) { in.page_tokens = 0; }, "page_tokens is 0"},
        BadInput{"heads", [](SelectInput& in, std::vector<ChunkView>&) { in.q.heads = 0; }, "Q has 0 heads"},
        BadInput{"dim", [](SelectInput& in, std::vector<ChunkView>&) { in.q.head_dim = 0; }, "of dimension 0"},
        BadInput{"start", [](SelectInput&, std::vector<ChunkView>& c) { c[0].chunk_start = -1; }, "from position -1"},
        BadInput{"tokens", [](SelectInput&, std::vector<ChunkView>& c) { c[0].chunk_tokens = -2; }, "has -2 tokens"},
        BadInput{"rows", [](SelectInput&, std::vector<ChunkView>& c) { c[0].q_begin = 3; }, "Q has 22 rows"},
        BadInput{"row", [](SelectInput&, std::vector<ChunkView>& c) { c[0].q_begin = -1; }, "from row -1"},
        BadInput{"context", [](SelectInput&, std::vector<ChunkView>& c) { c[0].chunk_start = 0x7ffffff0; },
                 "below 2^31 tokens"}),
    [](const ::testing::TestParamInfo<BadInput>& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace compact
