/// The loop that selectors share: scores of every mask row on the pool, then the budget.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <span>
#include <vector>

#include "compact/selector.h"
#include "compact/status.h"
#include "compact/thread_pool.h"
#include "src/core/bit_words.h"
#include "src/select/budget.h"

namespace compact {

/// The rule in force: a budget, or the selector's own threshold (kNative).
struct RowRule {
  BudgetKind kind = BudgetKind::kNative;
  float value = 0;
  Budget limits;  // min_pages and max_pages
  HeadThresholds thresholds;

  /// `native`: the value of kNative, unless thresholds say otherwise.
  RowRule(const Budget& budget, const HeadThresholds& per_head, float native)
      : kind(budget.kind),
        value(budget.kind == BudgetKind::kNative ? native : budget.value),
        limits(budget),
        thresholds(per_head) {}
};

/// What a scorer says about a row besides its scores.
struct RowVerdict {
  std::int64_t nonfinite_rows = 0;  // query rows; above 0 the mask row keeps all its pages
  float threshold = 0;              // kNative: keep a page with score >= this
  float elsewhere = 0;              // kMass: score of the chunk's pages, which are read anyway
  std::int32_t scored_pages = 0;    // above Np: the chunk's pages compete under kMass instead; their scores follow
};

/// Thresholds of the shape that the mask has, at this layer. `who` begins the message.
[[nodiscard]] Status check_thresholds(const char* who, const HeadThresholds& thresholds, std::int32_t layer,
                                      std::int32_t mask_heads);

/// row_forced_ranges_at (forced_rule.h) for a block of the step.
[[nodiscard]] ForcedRanges row_forced_ranges(const SelectInput& input, const QueryBlock& block,
                                             std::int32_t scored_pages) noexcept;

/// Fills input.scores: the scores of every mask row that has past pages, whatever the rule would need of them.
template <class Score>
void keep_scores(const SelectInput& input, float native, std::int32_t heads_per_row, const BlockMask& mask,
                 std::int64_t row_pages, ThreadPool& pool, Score score) {
  SelectScores& kept = *input.scores;
  const std::size_t num_blocks = mask.blocks.size();
  const std::size_t num_rows = static_cast<std::size_t>(mask.mask_heads) * num_blocks;
  kept.mask_heads = mask.mask_heads;
  kept.heads_per_row = heads_per_row;
  kept.row_pages = static_cast<std::int32_t>(row_pages);
  kept.blocks = mask.blocks;
  kept.scores.assign(num_rows * static_cast<std::size_t>(row_pages), 0.0F);
  kept.elsewhere.assign(num_rows, 0.0F);
  kept.scored_pages.assign(num_rows, 0);
  kept.nonfinite.assign(num_rows, 0);
  pool.parallel_for(static_cast<std::int64_t>(num_rows), [&](std::int64_t item, std::int32_t thread) {
    const auto row = static_cast<std::size_t>(item);
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(mask.blocks[row % num_blocks].chunk)];
    if (chunk.num_past_pages(input.page_tokens) == 0) return;
    const std::span<float> scores(kept.scores.data() + item * row_pages,
                                  static_cast<std::size_t>(chunk.num_pages(input.page_tokens)));
    const RowVerdict verdict = score(static_cast<std::int32_t>(row / num_blocks),
                                     static_cast<std::int32_t>(row % num_blocks), native, scores, thread);
    kept.elsewhere[row] = verdict.elsewhere;
    kept.scored_pages[row] = verdict.scored_pages;
    kept.nonfinite[row] = verdict.nonfinite_rows;
  });
}

/// Calls `score(head, block, value, scores [Kb], thread) -> RowVerdict` for every mask row that has past pages and a
/// choice, and writes the mask. The scorer fills scores [Np], or scored_pages of them. `mask` is reset; heads_per_row:
/// query heads that share a row. A density budget is met for each chunk by itself, so that a request alone and in a
/// batch selects the same pages. Where input.scores is set, it is filled and nothing decided.
template <class Score>
Status select_rows(const char* who, const SelectInput& input, const RowRule& rule, std::int32_t heads_per_row,
                   BlockMask& mask, ThreadPool& pool, Score score) try {
  CA_RETURN_IF_ERROR(check_thresholds(who, rule.thresholds, input.layer, mask.mask_heads));
  const auto num_blocks = static_cast<std::int64_t>(mask.blocks.size());
  const std::int64_t num_rows = mask.mask_heads * num_blocks;
  std::int64_t row_pages = 0;
  for (const ChunkView& chunk : input.chunks) {
    if (chunk.chunk_tokens > 0) row_pages = std::max<std::int64_t>(row_pages, chunk.num_pages(input.page_tokens));
  }
  if (input.scores != nullptr) {
    keep_scores(input, rule.value, heads_per_row, mask, row_pages, pool, score);
    return {};
  }
  const bool density = rule.kind == BudgetKind::kDensity;
  const auto num_threads = static_cast<std::size_t>(pool.num_threads());
  if (mask.words_per_row == 0) return {};  // no past, nothing to decide

  // Density compares rows, so all scores must stay; the other rules are done with a row at once.
  std::vector<float> scores(static_cast<std::size_t>((density ? num_rows : pool.num_threads()) * row_pages));
  std::vector<BudgetScratch> budgets(num_threads);
  for (BudgetScratch& budget : budgets) budget.reserve(row_pages);
  std::vector<std::int64_t> nonfinite(static_cast<std::size_t>(num_rows));
  std::vector<ScoreRow> waiting(density ? static_cast<std::size_t>(num_rows) : 0);  // no words: all pages are kept

  pool.parallel_for(num_rows, [&](std::int64_t item, std::int32_t thread) {
    const auto head = static_cast<std::int32_t>(item / num_blocks);
    const auto i = static_cast<std::int32_t>(item % num_blocks);
    const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
    const std::int32_t past_pages = chunk.num_past_pages(input.page_tokens);
    if (past_pages == 0) return;
    std::uint64_t* words = mask.row(head, i);
    const float value = rule.thresholds.at(input.layer, head, rule.value);
    if (keeps_all(rule.kind, value)) {
      set_bits(words, 0, past_pages);
      return;
    }
    const std::span<float> row_scores(scores.data() + (density ? item : thread) * row_pages,
                                      static_cast<std::size_t>(chunk.num_pages(input.page_tokens)));
    const RowVerdict verdict = score(head, i, value, row_scores, thread);
    nonfinite[static_cast<std::size_t>(item)] = verdict.nonfinite_rows;
    if (verdict.nonfinite_rows > 0) {
      set_bits(words, 0, past_pages);
      return;
    }
    const std::int32_t scored_pages = std::max(verdict.scored_pages, past_pages);
    const ScoreRow row{.scores = row_scores.first(static_cast<std::size_t>(density ? past_pages : scored_pages)),
                       .past_pages = past_pages,
                       .forced = row_forced_ranges(input, block, density ? past_pages : scored_pages),
                       .elsewhere = verdict.elsewhere,
                       .weight = std::int64_t{block.tokens} * heads_per_row,
                       .words = words};
    if (density) {
      waiting[static_cast<std::size_t>(item)] = row;
    } else {
      const bool native = rule.kind == BudgetKind::kNative;
      budgets[static_cast<std::size_t>(thread)].decide(rule.kind, native ? verdict.threshold : value, rule.limits, row);
    }
  });
  for (const std::int64_t rows : nonfinite) mask.nonfinite_rows += rows;
  if (!density) return {};

  for (std::int32_t b = 0; b < static_cast<std::int32_t>(input.chunks.size()); ++b) {
    const std::int64_t past_pages = input.chunks[static_cast<std::size_t>(b)].num_past_pages(input.page_tokens);
    std::vector<ScoreRow> rows;
    std::int64_t full_weight = 0;
    for (std::int64_t item = 0; item < num_rows; ++item) {
      const QueryBlock& block = mask.blocks[static_cast<std::size_t>(item % num_blocks)];
      if (block.chunk != b) continue;
      const ScoreRow& row = waiting[static_cast<std::size_t>(item)];
      if (row.words == nullptr) {
        full_weight += std::int64_t{block.tokens} * heads_per_row * past_pages;
      } else {
        rows.push_back(row);
      }
    }
    budgets[0].decide_density(rule.value, rule.limits, rows, full_weight);
  }
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory("select: no memory for the scores of the step");
}

}  // namespace compact
