/// What one run of a selector on one prompt found and cost.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>
#include <vector>

#include "compact/block_union.h"
#include "compact/status.h"
#include "engine/eval/work_file.h"
#include "engine/model/chunk_attention.h"

namespace compact::engine {

/// A prefill in figures, over its layers.
struct RunFigures {
  std::int32_t prompt_tokens = 0;
  double ttft_seconds = 0;
  double attention_seconds = 0;      // select + unite + attend
  double select_seconds = 0;         // of it, select + unite
  std::int64_t steps = 0;            // chunks x layers
  double state_bytes_per_token = 0;  // what the selector keeps beside K and V, all layers
  UnionStats stats;
  std::int64_t dense_chunks = 0;  // chunks x layers that ran dense by decision, first chunks aside
  std::int64_t nonfinite_rows = 0;

  /// Adds the sums; prompt_tokens and the state are the caller's.
  void add(const std::vector<LayerReport>& layers);
};

void put_figures(const RunFigures& figures, nlohmann::json& json);
/// Throws nlohmann::json::exception for a key that is missing or of another type.
void get_figures(const nlohmann::json& json, RunFigures& figures);

/// A sample answered with one selector.
struct EvalRecord : RunFigures {
  std::string task;
  std::int32_t length_tokens = 0;
  std::int32_t index = 0;
  std::string selector;  // as the user wrote it, flags of its own included
  double score = 0;      // 0 to 1
  std::vector<std::string> answers;
  std::string output;
  std::int32_t generated_tokens = 0;
  double decode_seconds = 0;

  /// What makes two records the same question to the same selector.
  using Key = std::tuple<std::string, std::int32_t, std::int32_t, std::string>;
  [[nodiscard]] Key key() const { return {task, length_tokens, index, selector}; }
};

[[nodiscard]] nlohmann::json to_json(const EvalRecord& record);
/// Errors: kIoError naming `where` and the key that is missing or of another type.
[[nodiscard]] Result<EvalRecord> record_from_json(const nlohmann::json& json, const std::string& where);

/// The answers among the lines of a work file.
/// Errors: those of record_from_json; kIoError for a question answered twice.
[[nodiscard]] Result<std::vector<EvalRecord>> answers_of(const std::vector<WorkLine>& lines);

}  // namespace compact::engine
