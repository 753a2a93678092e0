/// Selectors' own rules as budgets: what kNative means for those that have no rule but a budget.
#pragma once

#include <algorithm>

#include "compact/selector.h"

namespace compact {

inline constexpr float kOracleMass = 0.95F;  // chunk pages counted

[[nodiscard]] inline Budget native_as(BudgetKind kind, float value, Budget budget) noexcept {
  if (budget.kind == BudgetKind::kNative) budget.kind = kind, budget.value = value;
  return budget;
}

[[nodiscard]] inline Budget oracle_budget(const SelectorOptions& options) noexcept {
  return native_as(BudgetKind::kMass, kOracleMass, options.budget);
}
[[nodiscard]] inline Budget xattention_budget(const SelectorOptions& options) noexcept {
  return native_as(BudgetKind::kMass, options.xattention.mass, options.budget);
}
[[nodiscard]] inline Budget random_budget(const SelectorOptions& options) noexcept {
  return native_as(BudgetKind::kTopN, options.random.share, options.budget);
}

/// Pages until kept_tokens: no threshold (the kind stays native), and a limit.
[[nodiscard]] inline Budget quoka_budget(Budget budget, std::int32_t kept_tokens, std::int32_t page_tokens) noexcept {
  if (budget.kind != BudgetKind::kNative) return budget;
  const std::int32_t pages = kept_tokens / page_tokens + (kept_tokens % page_tokens == 0 ? 0 : 1);
  const std::int32_t most = budget.max_pages == 0 ? pages : std::min(pages, budget.max_pages);
  budget.max_pages = std::max(most, budget.min_pages);
  return budget;
}

}  // namespace compact
