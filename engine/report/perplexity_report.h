/// What `compact eval perplexity` writes.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "engine/eval/perplexity.h"

namespace compact::engine {

/// The windows of one length with one selector.
struct PerplexityRow {
  std::int32_t length_tokens = 0;
  std::string selector;
  std::int32_t windows = 0;
  std::vector<NllBucket> buckets;  // over the windows, ascending
  NllBucket all;
  /// exp of the mean loss minus dense's on the same windows; 0 without them.
  double ratio_to_dense = 0;
  UnionStats stats;
  double attention_seconds = 0;  // mean
  double step_seconds = 0;       // attention of one chunk and layer, mean
};

/// By length, then selector in order of first appearance.
[[nodiscard]] std::vector<PerplexityRow> perplexity_rows(const std::vector<PerplexityRecord>& records);

[[nodiscard]] nlohmann::json perplexity_json(const EvalConfiguration& configuration,
                                             const std::vector<PerplexityRow>& rows);
[[nodiscard]] std::string perplexity_markdown(const EvalConfiguration& configuration,
                                              const std::vector<PerplexityRow>& rows);

}  // namespace compact::engine
