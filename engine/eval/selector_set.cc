#include "engine/eval/selector_set.h"

#include <algorithm>
#include <utility>

#include "engine/model/model.h"
#include "engine/model/stopwatch.h"

namespace compact::engine {
namespace {

// A rule of its own needs more than scores, and rescued pages come on top of any budget.
bool shares_scores(const SelectorOptions& options) {
  const bool rescues =
      options.name == "sub-mean" && (options.sub_mean.min_coherence > 0 || options.sub_mean.probe_stride > 0);
  return options.budget.kind != BudgetKind::kNative && !rescues;
}

}  // namespace

Status SelectorSet::add(const SelectorOptions& options) {
  Member member{.options = options, .selector = nullptr, .scorer = scorers_.size(), .shares = shares_scores(options)};
  CA_ASSIGN_OR_RETURN(member.selector, make_selector(options));
  if (member.shares) {
    SelectorOptions scoring = options;
    scoring.budget = {};
    scoring.thresholds = {};
    const auto known =
        std::find_if(scorers_.begin(), scorers_.end(), [&](const Scorer& scorer) { return scorer.options == scoring; });
    member.scorer = static_cast<std::size_t>(known - scorers_.begin());
    if (known == scorers_.end()) scorers_.push_back({.options = std::move(scoring), .scores = {}});
  }
  members_.push_back(std::move(member));
  return {};
}

SummaryFields SelectorSet::summaries() const noexcept {
  SummaryFields fields{};
  for (const Member& member : members_) fields = either(fields, member.selector->needs().summaries);
  return fields;
}

void SelectorSet::begin_step() noexcept {
  for (Scorer& scorer : scorers_) scorer.filled = false;
}

Status SelectorSet::select(std::size_t member, const SelectInput& input, BlockMask& mask, double& seconds,
                           ThreadPool& pool) {
  const Member& of = members_[member];
  const Stopwatch stopwatch;
  if (!of.shares) {
    CA_RETURN_IF_ERROR(of.selector->select(input, mask, pool));
    seconds += stopwatch.seconds();
    return {};
  }
  Scorer& scorer = scorers_[of.scorer];
  double scoring_seconds = 0;
  if (!scorer.filled) {
    SelectInput scoring = input;
    scoring.scores = &scorer.scores;
    CA_RETURN_IF_ERROR(of.selector->select(scoring, unused_, pool));
    scorer.filled = true;
    scorer.seconds = scoring_seconds = stopwatch.seconds();
  }
  CA_RETURN_IF_ERROR(select_by_scores(input, scorer.scores, of.options.budget, of.options.thresholds, mask, pool));
  seconds += scorer.seconds + stopwatch.seconds() - scoring_seconds;
  return {};
}

}  // namespace compact::engine
