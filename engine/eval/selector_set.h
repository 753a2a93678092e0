/// Several selectors at the same step: those that differ in their budgets alone share their scores.
///
/// Scoring is nearly all of a selection's time, and a search for the right budget tries many.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "compact/selector.h"
#include "compact/status.h"
#include "compact/thread_pool.h"

namespace compact::engine {

class SelectorSet {
 public:
  /// Errors: those of make_selector.
  [[nodiscard]] Status add(const SelectorOptions& options);

  [[nodiscard]] std::size_t size() const noexcept { return members_.size(); }
  /// Of all members together.
  [[nodiscard]] SummaryFields summaries() const noexcept;

  /// Begins a step: kept scores count no longer.
  void begin_step() noexcept;
  /// The mask of a member at the step begun; adds to `seconds` what the member alone would have taken.
  /// Errors: those of Selector::select.
  [[nodiscard]] Status select(std::size_t member, const SelectInput& input, BlockMask& mask, double& seconds,
                              ThreadPool& pool);

 private:
  struct Scorer {
    SelectorOptions options;  // budget and thresholds aside
    SelectScores scores;
    double seconds = 0;
    bool filled = false;
  };
  struct Member {
    SelectorOptions options;
    std::unique_ptr<Selector> selector;
    std::size_t scorer = 0;
    bool shares = false;
  };

  std::vector<Member> members_;
  std::vector<Scorer> scorers_;
  BlockMask unused_;
};

}  // namespace compact::engine
