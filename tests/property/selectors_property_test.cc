// What holds for every selector, over generated steps on a real cache; the ids are those of docs/design/method.md 8.4.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "compact/block_union.h"
#include "compact/selector.h"
#include "src/core/bit_words.h"
#include "tests/kv_step.h"

namespace compact {
namespace {

using testing::ChunkSpec;
using ::testing::HasSubstr;
using testing::KvStep;
using testing::KvStepSpec;
using testing::pages_of_row;
using testing::random_kv_step;

struct SelectorCase {
  const char* name;
  SelectorOptions options;
  bool budgets = true;          // takes budgets other than its own
  bool mass = true;             // among them a mass: its scores are parts of a whole
  bool chunk_invariant = true;  // a query block that no edge cuts has the same row in every chunking
  bool sharded = true;          // a shard of the heads selects what the whole model selects for them
};

void PrintTo(const SelectorCase& c, std::ostream* out) { *out << c.name; }

const SelectorCase kCases[] = {
    {"dense", {.name = "dense"}, false},
    {"static", {.name = "static"}, false},
    // Its mass counts the chunk's pages as read, and an edge decides which these are.
    {"oracle", {.name = "oracle"}, true, true, false},
    {"oracle_threshold", {.name = "oracle", .budget = {.kind = BudgetKind::kThreshold, .value = 0.05F}}},
    {"mean_key", {.name = "mean-key", .mean_key = {.share = 0.15F}}},
    {"mean_key_lift", {.name = "mean-key", .mean_key = {.share = 0.01F, .lift = 1.5F}}},
    {"sub_mean", {.name = "sub-mean", .sub_mean = {.share = 0.15F, .lift = 1.0F}}},
    {"sub_mean_share", {.name = "sub-mean", .sub_mean = {.share = 0.1F, .lift = 0.0F, .peak_weight = 0.0F}}},
    // Rescued pages come on top of any budget.
    {"sub_mean_rescue",
     {.name = "sub-mean", .sub_mean = {.share = 0.5F, .min_coherence = 0.1F, .probe_stride = 4, .probe_mass = 0.1F}},
     false},
    {"xattention", {.name = "xattention", .xattention = {.stride = 8, .mass = 0.5F}}},
    {"xattention_16", {.name = "xattention", .xattention = {.stride = 16, .mass = 0.3F}}},
    // Its pages are counted, and an edge decides which compete; a threshold knows no others.
    {"quoka", {.name = "quoka", .quoka = {.picked_queries = 4, .kept_tokens = 64}}, true, false, false},
    {"quoka_threshold", {.name = "quoka", .budget = {.kind = BudgetKind::kThreshold, .value = 0.5F}}, true, false},
    // Its share is of Np, which an edge changes; its draws are by head number.
    {"random", {.name = "random", .random = {.share = 0.4F}}, true, true, false, false},
    {"mean_key_tile",
     {.name = "mean-key", .mean_key = {.norm = ScoreNorm::kTile, .vote = RowVote::kMean, .alpha = 0.3F}},
     false},
};

class Selectors : public ::testing::TestWithParam<SelectorCase> {
 protected:
  [[nodiscard]] static std::unique_ptr<Selector> make(const SelectorOptions& options) {
    auto selector = make_selector(options);
    EXPECT_TRUE(selector.ok()) << selector.status().message();
    return std::move(selector).value();
  }
  [[nodiscard]] std::unique_ptr<Selector> make() const { return make(GetParam().options); }
  [[nodiscard]] std::unique_ptr<Selector> make(BudgetKind kind, float value) const {
    SelectorOptions options = GetParam().options;
    options.budget = {.kind = kind, .value = value};
    return make(options);
  }
  [[nodiscard]] static BlockMask select(const Selector& selector, const SelectInput& input, std::int32_t threads = 1) {
    ThreadPool pool(threads);
    BlockMask mask;
    const Status status = selector.select(input, mask, pool);
    EXPECT_TRUE(status.ok()) << status.message();
    return mask;
  }
  // The step with the summaries that the selector wants.
  [[nodiscard]] static KvStepSpec prepare(KvStepSpec spec, const Selector& selector) {
    spec.summaries = selector.needs().summaries;
    return spec;
  }
  [[nodiscard]] std::vector<Budget> budget_ladder(BudgetKind kind) const {
    std::vector<Budget> ladder;
    for (const float value : {0.0F, 0.05F, 0.3F, 0.7F, 0.95F, 1.0F}) ladder.push_back({.kind = kind, .value = value});
    return ladder;
  }
  [[nodiscard]] std::vector<BudgetKind> budget_kinds() const {
    std::vector<BudgetKind> kinds = {BudgetKind::kTopN, BudgetKind::kDensity};
    if (GetParam().mass) kinds.push_back(BudgetKind::kMass);
    return kinds;
  }
};

class BudgetedSelectors : public Selectors {};
class InvariantSelectors : public Selectors {};
class ShardedSelectors : public Selectors {};

// Number of steps for a property; each builds a cache of some hundred tokens.
constexpr std::uint64_t kSteps = 25;

// I7, I16: any G, ragged edges, no past, no tokens; nothing outside the past, nothing non-finite.
TEST_P(Selectors, SurviveRaggedSteps) {
  const auto selector = make();
  for (std::uint64_t seed = 1; seed <= 2 * kSteps; ++seed) {
    const KvStep step(prepare(random_kv_step(seed), *selector));
    SCOPED_TRACE("seed " + std::to_string(seed) + " " + step.spec().describe());
    const BlockMask mask = select(*selector, step.select_input(), 2);
    EXPECT_EQ(mask.nonfinite_rows, 0);
    EXPECT_TRUE(mask.mask_heads == step.spec().q_heads || mask.mask_heads == step.spec().kv_heads);
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(mask.blocks.size()); ++i) {
      const auto chunk = static_cast<std::size_t>(mask.blocks[static_cast<std::size_t>(i)].chunk);
      const std::int32_t past = step.select_input().chunks[chunk].num_past_pages(step.spec().page_tokens);
      for (std::int32_t head = 0; head < mask.mask_heads; ++head) {
        for (const std::int32_t page : pages_of_row(mask, head, i)) ASSERT_LT(page, past);
      }
    }
  }
}

// I10: physical order, the rest of the batch, and threads change nothing.
TEST_P(Selectors, SeeTokensOnly) {
  const auto selector = make();
  for (std::uint64_t seed = 1; seed <= kSteps; ++seed) {
    KvStepSpec spec = prepare(random_kv_step(seed), *selector);
    SCOPED_TRACE("seed " + std::to_string(seed) + " " + spec.describe());
    const BlockMask batch = select(*selector, KvStep(spec).select_input());
    spec.page_seed += 1;
    const BlockMask permuted = select(*selector, KvStep(spec).select_input(), 3);
    ASSERT_EQ(batch.words, permuted.words);
    const std::vector<ChunkSpec> chunks = spec.chunks;
    std::int32_t first_block = 0;
    for (const ChunkSpec& chunk : chunks) {
      spec.chunks = {chunk};
      const BlockMask alone = select(*selector, KvStep(spec).select_input());
      for (std::int32_t head = 0; head < alone.mask_heads; ++head) {
        for (std::int32_t i = 0; i < static_cast<std::int32_t>(alone.blocks.size()); ++i) {
          ASSERT_EQ(pages_of_row(alone, head, i), pages_of_row(batch, head, first_block + i)) << "block " << i;
        }
      }
      first_block += static_cast<std::int32_t>(alone.blocks.size());
    }
  }
}

// I16: a tensor-parallel shard selects what its heads select in the whole model.
TEST_P(ShardedSelectors, ShardsEqualSlices) {
  const auto selector = make();
  for (std::uint64_t seed = 1; seed <= kSteps; ++seed) {
    KvStepSpec spec = prepare(random_kv_step(seed), *selector);
    const std::int32_t group = spec.q_heads / spec.kv_heads;
    spec.kv_heads = 2;
    spec.q_heads = 2 * group;
    SCOPED_TRACE("seed " + std::to_string(seed) + " " + spec.describe());
    const BlockMask whole = select(*selector, KvStep(spec).select_input());
    const std::int32_t shard_heads = whole.mask_heads / 2;
    spec.kv_heads = 1;
    spec.q_heads = group;
    for (spec.first_kv_head = 0; spec.first_kv_head < 2; ++spec.first_kv_head) {
      const BlockMask shard = select(*selector, KvStep(spec).select_input());
      for (std::int32_t head = 0; head < shard_heads; ++head) {
        for (std::int32_t i = 0; i < static_cast<std::int32_t>(shard.blocks.size()); ++i) {
          ASSERT_EQ(pages_of_row(shard, head, i), pages_of_row(whole, spec.first_kv_head * shard_heads + head, i));
        }
      }
    }
  }
}

// I8: what comes after a block does not change its row.
TEST_P(Selectors, AreCausal) {
  const auto selector = make();
  for (std::uint64_t seed = 1; seed <= kSteps; ++seed) {
    KvStepSpec spec = prepare(random_kv_step(seed), *selector);
    spec.chunks = {spec.chunks[0]};
    spec.chunks[0].tokens += 40;
    const BlockMask before = select(*selector, KvStep(spec).select_input());
    spec.changed_from = spec.chunks[0].start + spec.chunks[0].tokens / 2;
    SCOPED_TRACE("seed " + std::to_string(seed) + " " + spec.describe());
    const BlockMask after = select(*selector, KvStep(spec).select_input());
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(before.blocks.size()); ++i) {
      const QueryBlock& block = before.blocks[static_cast<std::size_t>(i)];
      if (block.first_position + block.tokens > spec.changed_from) continue;
      for (std::int32_t head = 0; head < before.mask_heads; ++head) {
        ASSERT_EQ(pages_of_row(before, head, i), pages_of_row(after, head, i)) << "block " << i;
      }
    }
  }
}

// I6: chunk edges that do not cut a block do not change its row. Pages that are past in one chunking and the chunk's in
// another are left out.
TEST_P(InvariantSelectors, ChunkEdgesThatCutNoBlockChangeNothing) {
  const auto selector = make();
  for (std::uint64_t seed = 1; seed <= kSteps; ++seed) {
    KvStepSpec spec = prepare(random_kv_step(seed), *selector);
    const std::int32_t start = spec.chunks[0].start;
    const std::int32_t end = start + 5 * spec.page_tokens + 3;
    spec.chunks = {{start, end - start, 9}};
    SCOPED_TRACE("seed " + std::to_string(seed) + " " + spec.describe());
    const BlockMask whole = select(*selector, KvStep(spec).select_input());
    const std::int32_t whole_past = start / spec.page_tokens;
    for (const std::int32_t chunk_tokens : {spec.page_tokens, 2 * spec.page_tokens + 7, 40}) {
      for (std::int32_t begin = start; begin < end; begin += chunk_tokens) {
        spec.chunks = {{begin, std::min(chunk_tokens, end - begin), 9}};
        const BlockMask part = select(*selector, KvStep(spec).select_input());
        for (std::int32_t i = 0; i < static_cast<std::int32_t>(part.blocks.size()); ++i) {
          for (std::int32_t w = 0; w < static_cast<std::int32_t>(whole.blocks.size()); ++w) {
            const QueryBlock& a = whole.blocks[static_cast<std::size_t>(w)];
            const QueryBlock& b = part.blocks[static_cast<std::size_t>(i)];
            if (a.first_position != b.first_position || a.tokens != b.tokens) continue;
            for (std::int32_t head = 0; head < part.mask_heads; ++head) {
              std::vector<std::int32_t> pages = pages_of_row(part, head, i);
              std::erase_if(pages, [&](std::int32_t page) { return page >= whole_past; });
              ASSERT_EQ(pages, pages_of_row(whole, head, w)) << "position " << a.first_position;
            }
          }
        }
      }
    }
  }
}

// I3: every way to ask for all pages gives all pages.
TEST_P(BudgetedSelectors, FullBudgetsKeepEveryPage) {
  std::vector<Budget> budgets = {{.kind = BudgetKind::kThreshold, .value = 0.0F}};
  for (const BudgetKind kind : budget_kinds()) budgets.push_back({.kind = kind, .value = 1.0F});
  for (const Budget& budget : budgets) {
    const auto selector = make(budget.kind, budget.value);
    for (std::uint64_t seed = 1; seed <= 5; ++seed) {
      const KvStep step(prepare(random_kv_step(seed), *selector));
      const BlockMask mask = select(*selector, step.select_input());
      for (std::int32_t i = 0; i < static_cast<std::int32_t>(mask.blocks.size()); ++i) {
        const auto chunk = static_cast<std::size_t>(mask.blocks[static_cast<std::size_t>(i)].chunk);
        const auto past =
            static_cast<std::size_t>(step.select_input().chunks[chunk].num_past_pages(step.spec().page_tokens));
        for (std::int32_t head = 0; head < mask.mask_heads; ++head) {
          ASSERT_EQ(pages_of_row(mask, head, i).size(), past) << "kind " << static_cast<int>(budget.kind);
        }
      }
    }
  }
}

// I3: every selector's own way to keep all is dense attention: the same lists.
TEST(KeepAll, EqualsTheDenseLists) {
  const SelectorOptions everything[] = {
      {.name = "dense"},
      {.name = "mean-key", .mean_key = {.share = 0}},
      {.name = "sub-mean", .sub_mean = {.share = 0, .lift = 0}},
      {.name = "xattention", .xattention = {.mass = 1}},
      {.name = "quoka", .quoka = {.kept_tokens = 1 << 20}},
      {.name = "random", .random = {.share = 1}},
      {.name = "external"},
  };
  ThreadPool pool(2);
  for (const SelectorOptions& options : everything) {
    const auto selector = make_selector(options).value();
    for (std::uint64_t seed = 1; seed <= 10; ++seed) {
      KvStepSpec spec = random_kv_step(seed);
      SCOPED_TRACE(options.name + " seed " + std::to_string(seed) + " " + spec.describe());
      spec.summaries = selector->needs().summaries;
      const KvStep step(spec);
      SelectInput input = step.select_input();
      BlockMask all;  // what `external` is told
      all.reset(spec.kv_heads, spec.page_tokens, input.chunks, make_query_blocks(input.chunks, 16));
      for (std::int32_t i = 0; i < static_cast<std::int32_t>(all.blocks.size()); ++i) {
        const auto chunk = static_cast<std::size_t>(all.blocks[static_cast<std::size_t>(i)].chunk);
        for (std::int32_t head = 0; head < spec.kv_heads; ++head) {
          set_bits(all.row(head, i), 0, input.chunks[chunk].num_past_pages(spec.page_tokens));
        }
      }
      const ExternalMask external{
          .heads = spec.kv_heads, .block_tokens = 16, .words = all.words, .words_per_row = all.words_per_row};
      input.external = &external;
      BlockMask mask;
      const Status status = selector->select(input, mask, pool);
      ASSERT_TRUE(status.ok()) << status.message();
      const UnionInput union_input{.chunks = input.chunks,
                                   .num_q_heads = spec.q_heads,
                                   .num_kv_heads = spec.kv_heads,
                                   .page_tokens = spec.page_tokens,
                                   .num_physical_pages = input.kv.num_pages,
                                   .forced = {0, 0}};
      PageLists lists;
      PageLists dense;
      ASSERT_TRUE(build_page_lists(union_input, mask, lists, pool).ok());
      ASSERT_TRUE(build_dense_lists(union_input, dense).ok());
      ASSERT_EQ(lists.units.size(), dense.units.size());
      for (std::size_t u = 0; u < lists.units.size(); ++u) {
        const auto pages_of = [&](const PageLists& of) {
          const AttentionUnit& unit = of.units[u];
          const auto first = of.page_ids.begin() + unit.list_begin;
          return std::vector(first, first + (unit.list_tokens + spec.page_tokens - 1) / spec.page_tokens);
        };
        EXPECT_EQ(pages_of(lists), pages_of(dense)) << "unit " << u;
      }
    }
  }
}

// I5: a larger budget keeps what a smaller one keeps.
TEST_P(BudgetedSelectors, BudgetsAreMonotone) {
  for (const BudgetKind kind : budget_kinds()) {
    for (std::uint64_t seed = 1; seed <= 8; ++seed) {
      std::vector<std::uint64_t> smaller;
      for (const Budget& budget : budget_ladder(kind)) {
        const auto selector = make(kind, budget.value);
        const KvStep step(prepare(random_kv_step(seed), *selector));
        SelectInput input = step.select_input();
        input.forced = {step.spec().page_tokens, 2 * step.spec().page_tokens};
        const BlockMask mask = select(*selector, input);
        for (std::size_t w = 0; w < smaller.size(); ++w) {
          ASSERT_EQ(smaller[w] & ~mask.words[w], 0U)
              << "kind " << static_cast<int>(kind) << " value " << budget.value << " seed " << seed;
        }
        smaller = mask.words;
      }
    }
  }
}

// Scores are kept once, and any budget on them is the selector's own with that budget.
TEST_P(BudgetedSelectors, KeptScoresDecideAsTheSelectorItself) {
  std::vector<BudgetKind> kinds = budget_kinds();
  kinds.push_back(BudgetKind::kThreshold);
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    const auto scorer = make();
    const KvStep step(prepare(random_kv_step(seed), *scorer));
    SCOPED_TRACE("seed " + std::to_string(seed) + " " + step.spec().describe());
    SelectInput input = step.select_input();
    input.forced = {step.spec().page_tokens, 2 * step.spec().page_tokens};
    SelectScores scores;
    input.scores = &scores;
    const BlockMask nothing = select(*scorer, input, 2);
    EXPECT_TRUE(std::all_of(nothing.words.begin(), nothing.words.end(), [](std::uint64_t w) { return w == 0; }));
    input.scores = nullptr;
    for (const BudgetKind kind : kinds) {
      for (Budget budget : budget_ladder(kind)) {
        budget.min_pages = static_cast<std::int32_t>(seed % 3);
        SelectorOptions options = GetParam().options;
        options.budget = budget;
        const BlockMask want = select(*make(options), input);
        ThreadPool pool(2);
        BlockMask got;
        const Status status = select_by_scores(input, scores, budget, {}, got, pool);
        ASSERT_TRUE(status.ok()) << status.message();
        EXPECT_EQ(got.words, want.words) << "kind " << static_cast<int>(kind) << " value " << budget.value;
        EXPECT_EQ(got.nonfinite_rows, want.nonfinite_rows);
      }
    }
  }
}

TEST(KeptScores, AreRefusedWhereThereAreNone) {
  ThreadPool pool(1);
  BlockMask mask;
  SelectScores scores;
  const KvStep step(random_kv_step(3));
  SelectInput input = step.select_input();
  const auto refused = [&](const Status& status, const char* text) {
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr(text));
  };
  refused(select_by_scores(input, scores, {.kind = BudgetKind::kTopN, .value = 0.5F}, {}, mask, pool), "no scores");
  refused(select_by_scores(input, scores, {}, {}, mask, pool), "native");
  input.scores = &scores;
  for (const char* name : {"dense", "static", "external"}) {
    refused(make_selector({.name = name}).value()->select(input, mask, pool), "no scores");
  }
}

// A density budget is met by every chunk, forced pages included, to within one row's page.
TEST_P(BudgetedSelectors, DensityIsMet) {
  const auto selector = make(BudgetKind::kDensity, 0.4F);
  for (std::uint64_t seed = 1; seed <= kSteps; ++seed) {
    const KvStep step(prepare(random_kv_step(seed), *selector));
    SCOPED_TRACE("seed " + std::to_string(seed) + " " + step.spec().describe());
    SelectInput input = step.select_input();
    input.forced = {step.spec().page_tokens, step.spec().page_tokens};
    const BlockMask mask = select(*selector, input);
    for (std::size_t b = 0; b < input.chunks.size(); ++b) {
      double wanted = 0;
      double rows = 0;
      double forced_pages = 0;
      double largest = 0;
      const std::int32_t past = input.chunks[b].num_past_pages(step.spec().page_tokens);
      for (std::int32_t i = 0; i < static_cast<std::int32_t>(mask.blocks.size()); ++i) {
        const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
        if (block.chunk != static_cast<std::int32_t>(b)) continue;
        const ForcedRanges forced = forced_ranges(input.forced, block, step.spec().page_tokens, past);
        for (std::int32_t head = 0; head < mask.mask_heads; ++head) {
          rows += block.tokens;
          largest = std::max<double>(largest, block.tokens);
          const std::vector<std::int32_t> pages = pages_of_row(mask, head, i);
          wanted += static_cast<double>(pages.size()) * block.tokens;
          for (std::int32_t j = 0; j < past; ++j) {
            if (!forced.contains(j)) continue;
            forced_pages += block.tokens;
            ASSERT_EQ(std::count(pages.begin(), pages.end(), j), 0) << "a forced page was paid for";
          }
        }
      }
      if (rows == 0 || past == 0) continue;
      const double target = 0.4F * rows * past;
      if (forced_pages >= target) {
        ASSERT_EQ(wanted, 0);
      } else {
        ASSERT_GE(wanted + forced_pages, target);
        ASSERT_LT(wanted + forced_pages, target + largest);
      }
    }
  }
}

// Thresholds per head replace the one threshold; a table of another shape is an error.
TEST_P(BudgetedSelectors, ThresholdsPerHead) {
  const KvStepSpec spec = prepare({.q_heads = 4, .kv_heads = 2, .chunks = {{16 * 9, 30, 4}}}, *make());
  const KvStep step(spec);
  SelectInput input = step.select_input();
  input.layer = 1;
  SelectorOptions options = GetParam().options;
  options.budget = {.kind = BudgetKind::kTopN, .value = 0.9F};
  const std::int32_t heads = select(*make(options), input).mask_heads;
  options.thresholds = {
      .num_layers = 2, .num_heads = heads, .values = std::vector<float>(2 * static_cast<std::size_t>(heads), 0.9F)};
  for (std::int32_t head = 0; head < heads; ++head) {
    options.thresholds.values[static_cast<std::size_t>(heads + head)] = head % 2 == 0 ? 0.2F : 1.0F;
  }
  const BlockMask mask = select(*make(options), input);
  for (std::int32_t head = 0; head < heads; ++head) {
    EXPECT_EQ(pages_of_row(mask, head, 0).size(), head % 2 == 0 ? 2U : 9U);
  }
  input.layer = 2;
  ThreadPool pool(1);
  BlockMask none;
  EXPECT_THAT(make(options)->select(input, none, pool).message(),
              HasSubstr("thresholds for 2 layers; this is layer 2"));
  input.layer = 0;
  options.thresholds.num_heads = heads + 1;
  options.thresholds.values.resize(2 * static_cast<std::size_t>(heads + 1), 0.9F);
  EXPECT_THAT(make(options)->select(input, none, pool).message(), HasSubstr("thresholds for"));
  options.thresholds.num_heads = heads;
  EXPECT_THAT(make_selector(options).status().message(), HasSubstr("thresholds for 2 layers x"));
}

std::vector<SelectorCase> cases_with(bool SelectorCase::*property) {
  std::vector<SelectorCase> cases;
  std::copy_if(std::begin(kCases), std::end(kCases), std::back_inserter(cases),
               [&](const SelectorCase& c) { return c.*property; });
  return cases;
}
std::string case_name(const ::testing::TestParamInfo<SelectorCase>& test) { return test.param.name; }

INSTANTIATE_TEST_SUITE_P(All, Selectors, ::testing::ValuesIn(kCases), case_name);
INSTANTIATE_TEST_SUITE_P(All, BudgetedSelectors, ::testing::ValuesIn(cases_with(&SelectorCase::budgets)), case_name);
INSTANTIATE_TEST_SUITE_P(All, ShardedSelectors, ::testing::ValuesIn(cases_with(&SelectorCase::sharded)), case_name);
INSTANTIATE_TEST_SUITE_P(All, InvariantSelectors, ::testing::ValuesIn(cases_with(&SelectorCase::chunk_invariant)),
                         case_name);

}  // namespace
}  // namespace compact
