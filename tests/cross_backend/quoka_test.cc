// QUOKA on the CPU: page scores against loops over tokens in fp64, on every instruction set that this machine runs, and
// attention over the copied tokens against attention in place.
#include "src/select/quoka.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "compact/attention.h"
#include "compact/block_union.h"
#include "compact/quoka.h"
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
  for (std::uint64_t seed = 1; seed <= testing::fewer_when_sanitized(60); ++seed) {
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
  for (const std::int32_t kept_tokens : {1, 16, 17, 96, 160, std::numeric_limits<std::int32_t>::max()}) {
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

// Options under which short steps keep some tokens and drop others.
constexpr QuokaTokenOptions kFewTokens{.run_tokens = 32, .picked_queries = 4, .kept_tokens = 24};

// Attention of the runs read in place, fp64: a cache in NHD order is one of pages of one token.
void attend_in_place(const KvStep& step, const QuokaTokens& selection, const AttentionOutput& output) {
  const SelectInput input = step.select_input();
  PagedKvView kv = input.kv;
  kv.num_pages *= kv.page_tokens;
  kv.page_stride = kv.token_stride;
  kv.page_tokens = 1;
  const std::int32_t group = input.q.heads / kv.num_kv_heads;
  std::vector<AttentionUnit> units;
  std::vector<std::int32_t> slots;
  for (const QuokaRun& run : selection.runs) {
    const auto table = step.page_table(static_cast<std::size_t>(run.chunk));
    const auto slot_of = [&](std::int32_t token) {
      return table[static_cast<std::size_t>(token / input.page_tokens)] * input.page_tokens + token % input.page_tokens;
    };
    for (std::int32_t head = 0; head < kv.num_kv_heads; ++head) {
      AttentionUnit unit{.q_begin = run.q_begin, .q_len = run.q_len, .q_head = head * group, .kv_head = head};
      unit.list_begin = static_cast<std::int32_t>(slots.size());
      unit.past_tokens = run.kept_tokens;
      unit.list_tokens = run.kept_tokens + run.q_len;
      units.push_back(unit);
      for (const std::int32_t token : selection.of(run, head)) slots.push_back(slot_of(token));
      for (std::int32_t t = 0; t < run.q_len; ++t) slots.push_back(slot_of(run.first_position + t));
    }
  }
  const Status status = attend_reference({input.q, kv, units, slots, group, input.softmax_scale}, output);
  ASSERT_TRUE(status.ok()) << status.message();
}

TEST(QuokaTokensBackends, AttentionOverTheCopyEqualsAttentionInPlace) {
  ThreadPool pool(2);
  for (std::uint64_t seed = 1; seed <= testing::fewer_when_sanitized(30); ++seed) {
    KvStepSpec spec = with_norms(random_kv_step(seed));
    spec.layout = KvLayout::kNhd;
    spec.dtype = DType::kF32;
    const KvStep step(spec);
    const SelectInput input = step.select_input();
    QuokaTokens selection;
    Status status = select_quoka_tokens(input, kFewTokens, selection, pool);
    ASSERT_TRUE(status.ok()) << status.message();
    const std::size_t rows = static_cast<std::size_t>(input.q.tokens) * static_cast<std::size_t>(input.q.heads);
    std::vector<float> o(rows * static_cast<std::size_t>(input.q.head_dim));
    std::vector<float> expected(o.size());
    std::vector<float> lse(rows);
    std::vector<float> expected_lse(rows);
    const auto output_of = [&](std::vector<float>& values, std::vector<float>& sums) {
      return AttentionOutput{contiguous_rows<float>(values.data(), input.q.tokens, input.q.heads, input.q.head_dim),
                             sums.data()};
    };
    status = attend_quoka(input, selection, output_of(o, lse), pool);
    ASSERT_TRUE(status.ok()) << status.message();
    attend_in_place(step, selection, output_of(expected, expected_lse));
    for (std::size_t at = 0; at < o.size(); ++at) {
      ASSERT_NEAR(o[at], expected[at], 2e-5F) << "seed " << seed << " " << spec.describe();
    }
    for (std::size_t at = 0; at < rows; ++at) ASSERT_NEAR(lse[at], expected_lse[at], 2e-5F);
  }
}

TEST(QuokaTokens, AllTokensAreDenseAttention) {
  ThreadPool pool(2);
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    const KvStep step(with_norms(random_kv_step(seed)));
    const SelectInput input = step.select_input();
    QuokaTokens selection;
    ASSERT_TRUE(select_quoka_tokens(input, {.run_tokens = 64, .kept_tokens = 1 << 20}, selection, pool).ok());
    const std::size_t floats = static_cast<std::size_t>(input.q.tokens * input.q.heads * input.q.head_dim);
    std::vector<float> o(floats);
    std::vector<float> dense(floats);
    const auto rows = [&](std::vector<float>& values) {
      return contiguous_rows<float>(values.data(), input.q.tokens, input.q.heads, input.q.head_dim);
    };
    ASSERT_TRUE(attend_quoka(input, selection, {rows(o)}, pool).ok());
    const UnionInput all{
        input.chunks, input.q.heads, input.kv.num_kv_heads, input.page_tokens, input.kv.num_pages, input.forced, {}};
    PageLists lists;
    ASSERT_TRUE(build_dense_lists(all, lists).ok());
    ASSERT_TRUE(
        attend_reference({input.q, input.kv, lists.units, lists.page_ids, lists.heads_per_unit, input.softmax_scale},
                         {rows(dense)})
            .ok());
    const float tolerance = step.spec().dtype == DType::kF32 ? 2e-5F : 2e-2F;  // bf16 kernels round Q and weights
    for (std::size_t at = 0; at < floats; ++at) {
      ASSERT_NEAR(o[at], dense[at], tolerance) << "seed " << seed << " " << step.spec().describe();
    }
  }
}

TEST(QuokaTokens, RunsAreAbsoluteAndOneThreadIsLikeMany) {
  const KvStep step(with_norms({.page_tokens = 16, .chunks = {{70, 60, 2}, {0, 10, 3}, {33, 1, 4}}}));
  QuokaTokens one;
  QuokaTokens many;
  ThreadPool single(1);
  ThreadPool three(3);
  ASSERT_TRUE(select_quoka_tokens(step.select_input(), kFewTokens, one, single).ok());
  ASSERT_TRUE(select_quoka_tokens(step.select_input(), kFewTokens, many, three).ok());
  EXPECT_EQ(one.tokens, many.tokens);
  std::vector<std::int32_t> starts;
  std::vector<std::int32_t> kept;
  for (const QuokaRun& run : one.runs) {
    starts.push_back(run.first_position);
    kept.push_back(run.kept_tokens);
  }
  EXPECT_EQ(starts, (std::vector<std::int32_t>{70, 96, 128, 0, 33}));
  EXPECT_EQ(kept, (std::vector<std::int32_t>{24, 24, 24, 0, 24}));
}

TEST(QuokaTokens, TiesGoToTheEarlier) {
  KvStep step(with_norms({.page_tokens = 16, .chunks = {{64, 32, 2}}}));
  for (std::int32_t t = 0; t < 32; ++t) {
    for (std::int32_t h = 0; h < 4; ++h) std::fill_n(step.query(0, t, h), 8, 0.0F);  // every score is 0
  }
  ThreadPool pool(1);
  QuokaTokens selection;
  ASSERT_TRUE(select_quoka_tokens(step.select_input(), kFewTokens, selection, pool).ok());
  std::vector<std::int32_t> first(24);
  std::iota(first.begin(), first.end(), 0);
  const auto kept = selection.of(selection.runs[0], 0);
  EXPECT_EQ(std::vector<std::int32_t>(kept.begin(), kept.end()), first);
  BlockMask mask;
  const auto selector = make_selector({.name = "quoka", .quoka = {.kept_tokens = 32}}).value();
  ASSERT_TRUE(selector->select(step.select_input(), mask, pool).ok());
  EXPECT_EQ(pages_of_row(mask, 0, 1), (std::vector<std::int32_t>{0, 1}));
}

TEST(QuokaTokens, NonFiniteRunsKeepAll) {
  KvStep step(with_norms({.q_heads = 4, .kv_heads = 2, .page_tokens = 16, .chunks = {{64, 64, 2}}}));
  step.query(0, 40, 1)[3] = std::numeric_limits<float>::infinity();
  QuokaTokens selection;
  ThreadPool pool(1);
  ASSERT_TRUE(select_quoka_tokens(step.select_input(), kFewTokens, selection, pool).ok());
  EXPECT_EQ(selection.nonfinite_rows, 1);
  ASSERT_EQ(selection.runs.size(), 2U);
  EXPECT_EQ(selection.runs[0].kept_tokens, 24);
  EXPECT_EQ(selection.runs[1].kept_tokens, 96);
  EXPECT_EQ(selection.of(selection.runs[1], 1).back(), 95) << "both KV heads: one copy serves them";
}

TEST(QuokaTokens, BadOptionsAndSelectionsAreNamed) {
  const KvStep step(with_norms({.page_tokens = 16, .chunks = {{40, 20, 2}}}));
  const SelectInput input = step.select_input();
  ThreadPool pool(1);
  QuokaTokens selection;
  const auto message = [&](const QuokaTokenOptions& options) {
    return select_quoka_tokens(input, options, selection, pool).message();
  };
  EXPECT_THAT(message({.run_tokens = -1}), HasSubstr("run_tokens is -1"));
  EXPECT_THAT(message({.kept_share = 1.5F}), HasSubstr("kept_share 1.5"));
  EXPECT_THAT(message({.picked_queries = 0}), HasSubstr("0 picked queries"));
  EXPECT_THAT(quoka_token_preset("quoka-50").status().message(), HasSubstr("known: quoka, quoka-25"));

  ASSERT_TRUE(select_quoka_tokens(input, kFewTokens, selection, pool).ok());
  std::vector<float> o(static_cast<std::size_t>(input.q.tokens * input.q.heads * input.q.head_dim));
  const AttentionOutput output{contiguous_rows<float>(o.data(), input.q.tokens, input.q.heads, input.q.head_dim)};
  QuokaTokens wrong = selection;
  wrong.tokens[3] = wrong.runs[0].first_position;
  EXPECT_THAT(attend_quoka(input, wrong, output, pool).message(), HasSubstr("run 0 names token 40; allowed: 0..39"));
  wrong = selection;
  wrong.runs.back().kept_tokens += 1;
  EXPECT_THAT(attend_quoka(input, wrong, output, pool).message(), HasSubstr("tokens from entry"));
  wrong = selection;
  wrong.runs[0].q_len += 30;
  EXPECT_THAT(attend_quoka(input, wrong, output, pool).message(), HasSubstr("run 0 has 50 queries"));
}

}  // namespace
}  // namespace compact
