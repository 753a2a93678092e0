// XAttention's sums on the CPU against loops over pairs in fp64, on every instruction set that this machine runs.
#include "src/select/xattention.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "src/select/selector.h"
#include "tests/cross_backend/targets.h"
#include "tests/fewer_when_sanitized.h"
#include "tests/kv_step.h"

namespace compact {
namespace {

using ::testing::HasSubstr;
using testing::KvStep;
using testing::KvStepSpec;
using testing::machine_targets;
using testing::OneTarget;
using testing::random_kv_step;

std::vector<QueryBlock> blocks_of(const SelectInput& input) {
  return make_query_blocks(input.chunks, block_tokens_within_page(kTileRows, input.page_tokens));
}

TEST(XAttentionBackends, SumsEqualTheReference) {
  ThreadPool pool(2);
  for (std::uint64_t seed = 1; seed <= testing::fewer_when_sanitized(60); ++seed) {
    const KvStep step(random_kv_step(seed));
    const SelectInput input = step.select_input();
    const XAttentionOptions options{.stride = seed % 3 == 0 ? 16 : seed % 3 == 1 ? 8 : 4, .mass = 0.5F};
    const std::vector<QueryBlock> blocks = blocks_of(input);
    XAttentionSums reference;
    ASSERT_TRUE(xattention_sums_reference(input, options, blocks, reference).ok());
    for (const std::int64_t target : machine_targets()) {
      const OneTarget one(target);
      XAttentionSums sums;
      const Status status = xattention_sums_cpu(input, options, blocks, sums, pool);
      ASSERT_TRUE(status.ok()) << status.message();
      ASSERT_EQ(sums.sums.size(), reference.sums.size());
      EXPECT_EQ(std::accumulate(sums.nonfinite.begin(), sums.nonfinite.end(), 0), 0);
      for (std::size_t at = 0; at < sums.sums.size(); ++at) {
        ASSERT_NEAR(sums.sums[at], reference.sums[at], 3e-5F * (1 + reference.sums[at]))
            << hwy::TargetName(target) << " seed " << seed << " stride " << options.stride << " "
            << step.spec().describe() << ", row " << at / static_cast<std::size_t>(sums.row_pages) << " page "
            << at % static_cast<std::size_t>(sums.row_pages);
      }
    }
  }
}

// Rows of the softmax sum to 1, so the sums of a block count its strided rows.
TEST(XAttentionBackends, EveryStridedRowHasOneVote) {
  ThreadPool pool(1);
  for (std::uint64_t seed = 1; seed <= 30; ++seed) {
    const KvStep step(random_kv_step(seed));
    const SelectInput input = step.select_input();
    const std::vector<QueryBlock> blocks = blocks_of(input);
    XAttentionSums sums;
    ASSERT_TRUE(xattention_sums_cpu(input, {.stride = 8}, blocks, sums, pool).ok());
    for (std::size_t row = 0; row < sums.nonfinite.size(); ++row) {
      const QueryBlock& block = blocks[row % blocks.size()];
      const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
      const StridedRows rows{8, chunk.chunk_start, chunk.context_tokens()};
      double votes = 0;
      for (std::int32_t i = block.first_position / 8; i <= (block.first_position + block.tokens - 1) / 8; ++i) {
        votes += rows.visible_columns(i) > 0 ? 1 : 0;
      }
      const auto first = sums.sums.begin() + static_cast<std::ptrdiff_t>(row) * sums.row_pages;
      EXPECT_NEAR(std::accumulate(first, first + sums.row_pages, 0.0), votes, 1e-4) << step.spec().describe();
    }
  }
}

TEST(XAttentionBackends, NonFiniteRowsAgree) {
  KvStepSpec spec{.q_heads = 4, .kv_heads = 2, .page_tokens = 16, .chunks = {{60, 50, 2}}};
  KvStep step(spec);
  step.query(0, 20, 1)[3] =
      std::numeric_limits<float>::quiet_NaN();  // position 80: block 5 of 16 tokens, number 2 here
  const SelectInput input = step.select_input();
  const std::vector<QueryBlock> blocks = blocks_of(input);
  XAttentionSums reference;
  ASSERT_TRUE(xattention_sums_reference(input, {.stride = 8}, blocks, reference).ok());
  XAttentionSums sums;
  ThreadPool pool(2);
  ASSERT_TRUE(xattention_sums_cpu(input, {.stride = 8}, blocks, sums, pool).ok());
  EXPECT_EQ(sums.nonfinite, reference.nonfinite);
  EXPECT_EQ(std::accumulate(sums.nonfinite.begin(), sums.nonfinite.end(), 0), 1);
  EXPECT_EQ(sums.nonfinite[blocks.size() * 1 + 2], 1);

  BlockMask mask;
  ASSERT_TRUE(make_selector({.name = "xattention", .xattention = {.stride = 8, .mass = 0.01F}})
                  .value()
                  ->select(input, mask, pool)
                  .ok());
  EXPECT_EQ(mask.nonfinite_rows, 1);
  EXPECT_EQ(testing::pages_of_row(mask, 1, 2).size(), 3U) << "all past pages";
}

TEST(XAttention, BadOptionsAndStridesAreNamed) {
  EXPECT_THAT(make_selector({.name = "xattention", .xattention = {.stride = 12}}).status().message(),
              HasSubstr("stride is 12; allowed: a power of two"));
  EXPECT_THAT(make_selector({.name = "xattention", .xattention = {.mass = -1}}).status().message(),
              HasSubstr("mass is -1"));
  const KvStep step({.page_tokens = 16, .chunks = {{60, 50, 2}}});
  BlockMask mask;
  ThreadPool pool(1);
  EXPECT_THAT(make_selector({.name = "xattention", .xattention = {.stride = 32}})
                  .value()
                  ->select(step.select_input(), mask, pool)
                  .message(),
              HasSubstr("stride 32 and pages of 16 tokens"));
}

}  // namespace
}  // namespace compact
