#include "engine/eval/statistics.h"

#include <algorithm>
#include <cmath>

namespace compact::engine {
namespace {

constexpr double kNormal95 = 1.959963984540054;

struct Moments {
  double count = 0;
  double sum = 0;
  double sum_of_squares = 0;
};

Moments moments(std::span<const double> values) {
  Moments m;
  for (const double value : values) {
    m.count += 1;
    m.sum += value;
    m.sum_of_squares += value * value;
  }
  return m;
}

// The normal interval of what `m` counts; `mean` is what is reported in its middle's stead.
Interval normal_interval(double mean, const Moments& m, double lowest, double highest) {
  const double center = m.sum / m.count;
  const double variance = std::max(0.0, m.sum_of_squares / m.count - center * center);
  const double half = kNormal95 * std::sqrt(variance / m.count);
  return {mean, std::max(lowest, center - half), std::min(highest, center + half)};
}

}  // namespace

Interval score_interval(std::span<const double> scores) {
  Moments m = moments(scores);
  const double mean = m.count > 0 ? m.sum / m.count : 0;
  m.count += 4;
  m.sum += 2;
  m.sum_of_squares += 2;
  return normal_interval(mean, m, 0, 1);
}

Interval difference_interval(std::span<const double> differences) {
  Moments m = moments(differences);
  const double mean = m.count > 0 ? m.sum / m.count : 0;
  m.count += 2;
  m.sum_of_squares += 1;
  return normal_interval(mean, m, -1, 1);
}

Interval mean_of(std::span<const Interval> intervals) {
  if (intervals.empty()) return {};
  Interval result;
  double below = 0;
  double above = 0;
  for (const Interval& interval : intervals) {
    result.mean += interval.mean;
    below += (interval.mean - interval.low) * (interval.mean - interval.low);
    above += (interval.high - interval.mean) * (interval.high - interval.mean);
  }
  const auto count = static_cast<double>(intervals.size());
  result.mean /= count;
  result.low = result.mean - std::sqrt(below) / count;
  result.high = result.mean + std::sqrt(above) / count;
  return result;
}

}  // namespace compact::engine
