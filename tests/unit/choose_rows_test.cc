// The budgets of the device on the CPU, by the code that runs on the device, against select_rows: from the same scores
// the same masks, bit for bit.
#include "src/select/cuda/choose_rows.h"

#include <gtest/gtest.h>

#include <array>
#include <limits>
#include <map>
#include <thread>

#include "src/select/select_rows.h"
#include "src/unite/cuda/step_layout.h"
#include "tests/one_thread.h"
#include "tests/step_case.h"

namespace compact {
namespace {

using testing::OneThread;
using testing::SharedSums;
using testing::StepCase;
using testing::StepRandom;
using testing::ThreadOfGroup;

// A step with scores of every row, and what both sides are told.
struct ChooseCase {
  StepCase step;
  StepLayout layout;
  std::vector<std::uint64_t> workspace;
  std::vector<float> scores, elsewhere;
  std::vector<std::int32_t> scored_pages, nonfinite;
  std::vector<float> head_values;
  std::vector<PageCut> cuts;
  ChooseRule rule;
  Budget budget;  // kind, value, limits of the CPU's side; kNative with rules of scorers
  HeadThresholds thresholds;

  explicit ChooseCase(StepRandom& random) {
    make_random_step(step, random);
    step.input.chunks = step.chunks.data();
    step.input.page_tables = step.page_tables.data();
    Result<StepLayout> made = lay_out_step(step.input);
    EXPECT_TRUE(made.ok()) << made.status().message();
    layout = *made;
    workspace.resize(static_cast<std::size_t>(layout.sizes.workspace_bytes) / 8);
    std::int32_t error = 0;
    OneThread thread;
    for (std::int32_t b = 0; b < layout.plan_ctas; ++b) {
      plan_chunk(thread, plan_args(layout, step.input, &error, workspace.data()), b);
    }
    EXPECT_EQ(error, 0);
    draw_rule(random);
    draw_scores(random);
  }

  ScoreRows rows() {
    return {.mask_heads = layout.shape.mask_heads,
            .max_blocks = layout.shape.max_blocks,
            .row_stride = row_stride(),
            .scores = scores.data(),
            .elsewhere = elsewhere.empty() ? nullptr : elsewhere.data(),
            .scored_pages = scored_pages.data(),
            .nonfinite = nonfinite.data()};
  }

  ChooseArgs args(std::uint64_t* mask, std::uint64_t* nonfinite_rows) {
    return {.tables = layout.tables(workspace.data()),
            .rows = rows(),
            .rule = rule,
            .forced = step.input.forced,
            .page_tokens = layout.shape.page_tokens,
            .block_tokens = layout.shape.block_tokens,
            .heads_per_row = step.input.num_q_heads / layout.shape.mask_heads,
            .words_per_row = layout.shape.words_per_row,
            .chunk_cuts = cuts.data(),
            .mask = mask,
            .nonfinite_rows = nonfinite_rows};
  }

  // The CPU's decision about the same rows.
  void select_on_cpu(BlockMask& mask) {
    SelectInput input;
    input.chunks = step.host_chunks;
    input.page_tokens = step.input.page_tokens;
    input.forced = step.input.forced;
    mask.reset(layout.shape.mask_heads, step.input.page_tokens, step.host_chunks,
               make_query_blocks(step.host_chunks, layout.shape.block_tokens));
    ThreadPool pool(1);
    const auto score = [&](std::int32_t head, std::int32_t i, float value, std::span<float> out, std::int32_t) {
      const std::int64_t row = std::int64_t{head} * layout.shape.max_blocks + i;
      const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
      RowVerdict verdict;
      verdict.nonfinite_rows = nonfinite[static_cast<std::size_t>(row)];
      std::copy_n(scores.begin() + row * row_stride(), out.size(), out.begin());
      if (!elsewhere.empty()) verdict.elsewhere = elsewhere[static_cast<std::size_t>(row)];
      if (rule.chunk_competes) verdict.scored_pages = (block.first_position + block.tokens - 1) / input.page_tokens + 1;
      verdict.threshold = std::max(value, rule.lift / static_cast<float>(scored_pages[static_cast<std::size_t>(row)]));
      if (rule.above) verdict.threshold = std::nextafter(value, std::numeric_limits<float>::infinity());
      if (rule.everything) verdict.threshold = -std::numeric_limits<float>::infinity();
      return verdict;
    };
    const RowRule cpu_rule(budget, thresholds, budget.value);
    const Status status =
        select_rows("test", input, cpu_rule, step.input.num_q_heads / layout.shape.mask_heads, mask, pool, score);
    EXPECT_TRUE(status.ok()) << status.message();
  }

  std::string text() const {
    return step.text() + fmt::format("; kind {} value {} lift {} above {} everything {} competes {} min {} max {}{}",
                                     static_cast<int>(rule.kind), rule.value, rule.lift, rule.above, rule.everything,
                                     rule.chunk_competes, rule.min_pages, rule.max_pages,
                                     head_values.empty() ? "" : " values per head");
  }

 private:
  std::int64_t row_stride() const { return (layout.shape.list_capacity + 3) / 4 * 4; }

  void draw_rule(StepRandom& random) {
    rule.kind = random.pick({BudgetKind::kThreshold, BudgetKind::kTopN, BudgetKind::kMass, BudgetKind::kDensity});
    rule.value = random.pick({0.0F, 0.01F, 0.1F, 0.3F, 0.7F, 0.95F, 0.999F, 1.0F});
    const bool native = rule.kind == BudgetKind::kThreshold && random.below(2) == 0;
    if (native) {
      const std::int32_t form = random.below(3);
      rule.lift = form == 0 ? random.pick({0.5F, 1.5F, 4.0F}) : 0.0F;
      rule.above = form == 1;
      rule.everything = form == 2;
      if (rule.everything) rule.value = 1024;
    }
    rule.chunk_competes = random.below(3) == 0;
    const std::int32_t limits = random.below(4);
    if (limits % 2 == 1) rule.min_pages = 1 + random.below(9);
    if (limits / 2 == 1 || rule.everything) rule.max_pages = rule.min_pages + random.below(20) + 1;
    budget = {native ? BudgetKind::kNative : rule.kind, rule.value, rule.min_pages, rule.max_pages};
    if (rule.kind == BudgetKind::kDensity || rule.everything || random.below(3) != 0) return;
    for (std::int32_t head = 0; head < layout.shape.mask_heads; ++head) {
      head_values.push_back(random.pick({0.0F, 0.05F, 0.2F, 0.6F, 1.0F}));
    }
    thresholds = {1, layout.shape.mask_heads, head_values};
    rule.head_values = head_values.data();
  }

  // Shares, cosines or zeros; many of them equal.
  void draw_scores(StepRandom& random) {
    const std::size_t num_rows =
        static_cast<std::size_t>(layout.shape.mask_heads) * static_cast<std::size_t>(layout.shape.max_blocks);
    scores.resize(num_rows * static_cast<std::size_t>(row_stride()));
    const std::int32_t form = random.below(rule.kind == BudgetKind::kMass ? 3 : 4);
    for (float& score : scores) {
      const auto fraction = static_cast<float>(random.below(1 << 24)) * 0x1p-24F;
      score = form == 0   ? fraction
              : form == 1 ? std::ldexp(fraction, -random.below(150))  // down to subnormal numbers
              : form == 2 ? static_cast<float>(random.below(4)) * 0.25F
                          : static_cast<float>(random.below(9) - 4) * 0.25F;
      if (form == 3 && score == 0 && random.below(2) == 0) score = -0.0F;
    }
    if (random.below(2) == 0) {
      elsewhere.resize(num_rows);
      for (float& x : elsewhere) x = static_cast<float>(random.below(100)) * random.pick({0.0F, 0.01F, 1.0F});
    }
    scored_pages.resize(num_rows);
    for (std::int32_t& pages : scored_pages) pages = 1 + random.below(200);
    nonfinite.resize(num_rows);
    for (std::int32_t& rows : nonfinite) rows = random.below(20) == 0 ? 1 + random.below(100) : 0;
    cuts.resize(static_cast<std::size_t>(layout.shape.num_chunks));
  }
};

// Every group that the device would launch, one after the other.
template <class Team>
void choose_all(const ChooseCase& c, const ChooseArgs& args, Team& team) {
  if (args.rule.kind == BudgetKind::kDensity && !keeps_all(args.rule.kind, args.rule.value)) {
    for (std::int32_t b = 0; b < c.layout.shape.num_chunks; ++b) cut_chunk(team, args, b);
  }
  for (std::int32_t head = 0; head < args.rows.mask_heads; ++head) {
    for (std::int32_t i = 0; i < args.rows.max_blocks; ++i) choose_row(team, args, head, i);
  }
}

// Empty if the mask of the device is the CPU's, in all words of all rows that exist.
std::string difference(ChooseCase& c, const std::vector<std::uint64_t>& mask, std::uint64_t nonfinite_rows) {
  BlockMask want;
  c.select_on_cpu(want);
  if (nonfinite_rows != static_cast<std::uint64_t>(want.nonfinite_rows)) {
    return fmt::format("{} non-finite rows, CPU {}", nonfinite_rows, want.nonfinite_rows);
  }
  const CudaStepSizes& sizes = c.layout.sizes;
  for (std::int32_t head = 0; head < want.mask_heads; ++head) {
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(want.blocks.size()); ++i) {
      const std::uint64_t* row = mask.data() + (std::int64_t{head} * sizes.max_blocks + i) * sizes.words_per_row;
      for (std::int32_t w = 0; w < sizes.words_per_row; ++w) {
        const std::uint64_t cpu = w < want.words_per_row ? want.row(head, i)[w] : 0;
        if (row[w] != cpu) return fmt::format("head {} block {} word {}: {:x}, CPU {:x}", head, i, w, row[w], cpu);
      }
    }
  }
  return {};
}

TEST(ChooseRows, TwoThousandStepsEqualTheCpu) {
  std::map<BudgetKind, std::int64_t> kept, pages;
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    StepRandom random(seed);
    ChooseCase c(random);
    std::vector<std::uint64_t> mask(static_cast<std::size_t>(c.layout.sizes.mask_words), ~std::uint64_t{0});
    std::uint64_t nonfinite_rows = 0;
    OneThread thread;
    choose_all(c, c.args(mask.data(), &nonfinite_rows), thread);
    ASSERT_EQ(difference(c, mask, nonfinite_rows), "") << "seed " << seed << ": " << c.text();
    BlockMask want;
    c.select_on_cpu(want);
    for (std::size_t i = 0; i < want.words.size(); ++i) kept[c.rule.kind] += std::popcount(want.words[i]);
    for (const QueryBlock& block : want.blocks) {
      pages[c.rule.kind] +=
          std::int64_t{want.mask_heads} *
          c.step.host_chunks[static_cast<std::size_t>(block.chunk)].num_past_pages(c.step.input.page_tokens);
    }
  }
  for (const auto& [kind, count] : kept) {  // neither nothing nor everything
    EXPECT_GT(count * 10, pages[kind]) << static_cast<int>(kind);
    EXPECT_LT(count * 10, 9 * pages[kind]) << static_cast<int>(kind);
  }
}

// What threads do together is what one does.
TEST(ChooseRows, ThreadsOfAGroupShareTheWork) {
  for (std::uint64_t seed = 10000; seed < 10020; ++seed) {
    StepRandom random(seed);
    ChooseCase c(random);
    std::vector<std::uint64_t> mask(static_cast<std::size_t>(c.layout.sizes.mask_words), ~std::uint64_t{0});
    std::uint64_t nonfinite_rows = 0;
    const ChooseArgs args = c.args(mask.data(), &nonfinite_rows);
    constexpr std::int32_t kThreads = 3;
    SharedSums shared(kThreads);
    std::vector<std::thread> threads;
    for (std::int32_t t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        ThreadOfGroup team{shared, t, kThreads};
        choose_all(c, args, team);
      });
    }
    for (std::thread& thread : threads) thread.join();
    ASSERT_EQ(difference(c, mask, nonfinite_rows), "") << "seed " << seed << ": " << c.text();
  }
}

TEST(ChooseRows, OrderedBitsAreInTheOrderOfScores) {
  constexpr std::array<float, 9> kAscending = {
      -std::numeric_limits<float>::infinity(), -3.0F, -1e-45F, 0.0F, 1e-45F, 1e-30F, 0.5F, 0.50000006F,
      std::numeric_limits<float>::max()};
  for (std::size_t i = 1; i < kAscending.size(); ++i) {
    EXPECT_LT(ordered_bits(kAscending[i - 1]), ordered_bits(kAscending[i])) << i;
    EXPECT_EQ(score_of(ordered_bits(kAscending[i])), kAscending[i]);
  }
  EXPECT_EQ(ordered_bits(-0.0F), ordered_bits(0.0F));
  EXPECT_GT(ordered_bits(kAscending[0]), 0U);
}

}  // namespace
}  // namespace compact
