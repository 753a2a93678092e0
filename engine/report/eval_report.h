/// What an evaluation writes: accuracy beside density and time, per task, length and selector, with paired differences
/// to dense.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "engine/eval/record.h"
#include "engine/eval/statistics.h"

namespace compact::engine {

/// Samples of one task and length with one selector; for the mean over tasks, `task` is "mean of n tasks".
struct EvalRow {
  std::string task;
  std::int32_t length_tokens = 0;
  std::string selector;
  std::int32_t samples = 0;
  Interval accuracy;  // 0 to 1
  /// To the selector `dense` on the same samples; not there for dense itself and without a dense run.
  std::optional<Interval> difference;
  std::int32_t pairs = 0;
  UnionStats stats;
  double ttft_seconds = 0;           // mean
  double attention_seconds = 0;      // mean
  double step_seconds = 0;           // attention of one chunk and layer, mean
  double select_seconds = 0;         // of it, selection and union
  double state_bytes_per_token = 0;  // what the selector keeps beside K and V, all layers; mean
  double prompt_tokens = 0;          // mean
  std::int64_t dense_chunks = 0;
  std::int64_t nonfinite_rows = 0;
};

/// kOverTasks: a row for the mean over the tasks of a length, if there are several.
enum class MeanRows : std::int32_t { kNone = 0, kOverTasks = 1 };

/// Rows in the order of first appearance: by length, then task, then selector; after the tasks of a length their means.
[[nodiscard]] std::vector<EvalRow> eval_rows(const std::vector<EvalRecord>& records, MeanRows means);

/// Keys: configuration, digest, rows (task, tokens, samples, selector, accuracy in percent with its interval,
/// difference in points, density, union_inflation, ttft_seconds, attention_seconds, ..).
[[nodiscard]] nlohmann::json eval_json(const EvalConfiguration& configuration, const std::vector<EvalRow>& rows);

[[nodiscard]] std::string eval_markdown(const EvalConfiguration& configuration, const std::vector<EvalRow>& rows);

}  // namespace compact::engine
