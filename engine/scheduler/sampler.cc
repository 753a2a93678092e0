#include "engine/scheduler/sampler.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace compact::engine {

Result<Sampler> Sampler::create(const SamplingOptions& options) {
  if (!(options.temperature >= 0 && options.temperature <= 100)) {
    return invalid_argument(fmt::format("temperature is {}\n  allowed: 0 (greedy) to 100", options.temperature));
  }
  if (!(options.top_p > 0 && options.top_p <= 1)) {
    return invalid_argument(fmt::format("top-p is {}\n  allowed: above 0, at most 1", options.top_p));
  }
  if (options.top_k < 0)
    return invalid_argument(fmt::format("top-k is {}\n  allowed: 0 (all tokens) or more", options.top_k));
  return Sampler(options);
}

std::int32_t Sampler::sample(std::span<const float> logits) {
  const auto largest = std::max_element(logits.begin(), logits.end());
  if (options_.temperature == 0) return static_cast<std::int32_t>(largest - logits.begin());

  candidates_.clear();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    candidates_.emplace_back(std::exp((logits[i] - *largest) / options_.temperature), static_cast<std::int32_t>(i));
  }
  // Descending probability, ties to the lower id: a total order, so the result does not depend on the sort.
  std::sort(candidates_.begin(), candidates_.end(),
            [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; });
  if (options_.top_k > 0 && candidates_.size() > static_cast<std::size_t>(options_.top_k)) {
    candidates_.resize(static_cast<std::size_t>(options_.top_k));
  }
  double total = 0;
  for (const auto& [probability, token] : candidates_) total += static_cast<double>(probability);
  const double nucleus = total * static_cast<double>(options_.top_p);
  double kept = 0;
  std::size_t num_kept = 0;
  while (num_kept < candidates_.size() && (num_kept == 0 || kept < nucleus)) {
    kept += static_cast<double>(candidates_[num_kept++].first);
  }
  // 53 random bits scaled by hand: std::uniform_real_distribution differs between standard libraries.
  double left = static_cast<double>(random_() >> 11) * 0x1p-53 * kept;
  for (std::size_t i = 0; i + 1 < num_kept; ++i) {
    left -= static_cast<double>(candidates_[i].first);
    if (left < 0) return candidates_[i].second;
  }
  return candidates_[num_kept - 1].second;
}

}  // namespace compact::engine
