/// Confidence intervals of scores and of paired differences of scores.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace compact::engine {

struct Interval {
  double mean = 0;
  double low = 0;
  double high = 0;
};

/// Mean of scores in [0, 1] with its 95 % interval after Agresti and Coull (1998): two successes and two failures are
/// added before the normal interval is taken, so that all right does not mean certain.
[[nodiscard]] Interval score_interval(std::span<const double> scores);

/// Mean of paired differences in [-1, 1] with its 95 % interval after Agresti and Min (2005): half a pair is added for
/// either direction and one without difference. A bootstrap would give [0, 0] when no pair differs; this gives the
/// width that so few samples leave.
[[nodiscard]] Interval difference_interval(std::span<const double> differences);

/// The mean of independent means, each with its interval: variances add.
[[nodiscard]] Interval mean_of(std::span<const Interval> intervals);

}  // namespace compact::engine
