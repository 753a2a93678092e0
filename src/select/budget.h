/// From scores to pages: the budgets of docs/design/method.md 3.2, common to all selectors.
///
/// The best pages are found by a histogram over the scores' exponent and three leading bits of mantissa (8 bins an
/// octave, 32 octaves, clamped), scanned from the top; only the bin in which the budget ends is sorted, by (score
/// descending, page ascending). Weights are integers throughout, so the result is that of a full sort, exactly.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "compact/selector.h"
#include "compact/status.h"
#include "src/select/budget_math.h"

namespace compact {

/// A row of scores and where its decision goes. kMass and kDensity count forced pages first and choose among the
/// others; the limits on pages count what the rule chooses.
struct ScoreRow {
  /// [Np or more]  finite; kMass: 0 or more. Under kMass pages of the chunk may follow those of the past and compete
  /// with them; they are never written.
  std::span<const float> scores;
  std::int32_t past_pages = 0;     // Np
  ForcedRanges forced;             // read anyway; may reach into the chunk where that has scores
  float elsewhere = 0;             // kMass: score of what is read anyway and not in `scores`
  std::int64_t weight = 1;         // kDensity: rows that this one stands for, tokens x query heads
  std::uint64_t* words = nullptr;  // [ceil(Np / 64)]  bits are added
};

/// Values out of range, by kind. `who` begins the message.
[[nodiscard]] Status check_budget(const char* who, const Budget& budget);

class BudgetScratch {
 public:
  /// Room for the pages of one bin, so that decisions do not allocate. May throw std::bad_alloc.
  void reserve(std::int64_t pages) { boundary_.reserve(static_cast<std::size_t>(pages)); }

  /// The decision for one row: kind kThreshold, kTopN or kMass.
  void decide(BudgetKind kind, float value, const Budget& limits, const ScoreRow& row);

  /// One threshold for all rows: kept and forced pages, weighted, reach value * (sum of weight * Np). `full_weight`:
  /// sum of weight * Np over rows that keep all their pages; they are in the total and in what is kept.
  void decide_density(float value, const Budget& limits, std::span<const ScoreRow> rows, std::int64_t full_weight);

 private:
  struct Candidate {
    float score;
    std::int32_t row;
    std::int32_t page;
  };

  void keep_best(const ScoreRow& row, std::int32_t pages, bool skip_forced);
  void limit_pages(const Budget& limits, const ScoreRow& row, bool skip_forced);
  template <class Weight, class Visit>
  void keep_prefix(std::span<const ScoreRow> rows, std::uint64_t target, Weight weight, Visit visit);

  std::vector<Candidate> boundary_;
};

}  // namespace compact
