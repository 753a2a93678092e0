/// Rows of scores with a rule for them: for the budgets of the device, run on the host or on a GPU, against
/// select_rows.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "src/select/cuda/choose_rows.h"
#include "src/select/select_rows.h"
#include "src/unite/cuda/step_layout.h"
#include "tests/one_thread.h"
#include "tests/step_case.h"

namespace compact::testing {

/// A step with scores of every row, and what both sides are told.
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

  /// large: a batch of two with 1016 past pages, a row per query head.
  explicit ChooseCase(StepRandom& random, bool large = false) {
    if (large) {
      step.input.num_kv_heads = 8;
      step.input.num_q_heads = step.input.mask_heads = 32;
      step.input.page_tokens = step.input.block_tokens = 128;
      step.place({{130048, 1024}, {70000, 500}}, random, 0);
    } else {
      make_random_step(step, random);
    }
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

/// Empty if the mask of the device is the CPU's, in all words of all rows that exist.
inline std::string difference(ChooseCase& c, const std::vector<std::uint64_t>& mask, std::uint64_t nonfinite_rows) {
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

}  // namespace compact::testing
