// Budgets on scores that a selector has kept.
#include <fmt/format.h>

#include <algorithm>

#include "src/select/select_rows.h"
#include "src/select/selector.h"

namespace compact {
namespace {

// Blocks, rows and places of the scores are those of the step.
Status check_scores(const SelectInput& input, const SelectScores& scores) {
  const std::size_t num_rows = static_cast<std::size_t>(scores.mask_heads) * scores.blocks.size();
  const bool filled = scores.mask_heads > 0 && scores.nonfinite.size() == num_rows &&
                      scores.elsewhere.size() == num_rows && scores.scored_pages.size() == num_rows &&
                      scores.scores.size() == num_rows * static_cast<std::size_t>(scores.row_pages);
  if (!filled) return invalid_argument("select_by_scores: no scores; allowed: those that select() has kept");
  std::int64_t tokens = 0;
  for (const QueryBlock& block : scores.blocks) {
    tokens += block.tokens;
    const bool fits =
        block.chunk >= 0 && block.chunk < std::ssize(input.chunks) &&
        input.chunks[static_cast<std::size_t>(block.chunk)].num_pages(input.page_tokens) <= scores.row_pages;
    if (!fits) return invalid_argument("select_by_scores: scores of another step");
  }
  for (const ChunkView& chunk : input.chunks) tokens -= chunk.chunk_tokens;
  return tokens == 0 ? Status() : invalid_argument("select_by_scores: scores of another step");
}

}  // namespace

Status check_scoreless(const char* who, const SelectInput& input) {
  if (input.scores != nullptr) {
    return invalid_argument(fmt::format("{}: has no scores to keep; allowed: SelectInput::scores null", who));
  }
  return check_select_input(input);
}

Status select_by_scores(const SelectInput& input, const SelectScores& scores, const Budget& budget,
                        const HeadThresholds& thresholds, BlockMask& mask, ThreadPool& pool) {
  CA_RETURN_IF_ERROR(check_budget("select_by_scores", budget));
  if (budget.kind == BudgetKind::kNative) {
    return invalid_argument("select_by_scores: the native rule is the selector's own; allowed: any other budget");
  }
  CA_RETURN_IF_ERROR(check_scores(input, scores));
  mask.reset(scores.mask_heads, input.page_tokens, input.chunks, scores.blocks);
  SelectInput step = input;
  step.scores = nullptr;
  return select_rows("select_by_scores", step, RowRule(budget, thresholds, 0), scores.heads_per_row, mask, pool,
                     [&](std::int32_t head, std::int32_t i, float, std::span<float> row_scores, std::int32_t) {
                       const std::size_t row =
                           static_cast<std::size_t>(head) * scores.blocks.size() + static_cast<std::size_t>(i);
                       std::copy_n(scores.scores.begin() + static_cast<std::ptrdiff_t>(row) * scores.row_pages,
                                   row_scores.size(), row_scores.begin());
                       RowVerdict verdict;
                       verdict.nonfinite_rows = scores.nonfinite[row];
                       verdict.elsewhere = scores.elsewhere[row];
                       verdict.scored_pages = scores.scored_pages[row];
                       return verdict;
                     });
}

}  // namespace compact
