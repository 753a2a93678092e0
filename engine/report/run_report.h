/// What a run prints and writes: density, union inflation and times, per layer and in all.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "engine/report/page_map_svg.h"
#include "engine/scheduler/answer.h"
#include "engine/scheduler/generate.h"

namespace compact::engine {

/// Sums over the layers of a prefill.
struct RunTotals {
  double append_seconds = 0;
  double select_seconds = 0;
  double unite_seconds = 0;
  double attend_seconds = 0;
  double attention_seconds = 0;  // select + unite + attend
  UnionStats stats;
};
[[nodiscard]] RunTotals sum_layers(const GenerateResult& result);

/// Keys: answer, prompt_tokens, ttft_seconds, attention_seconds, density, union_inflation, selector, mode, backend, and
/// what explains them: options, stage times, layers, dense decisions by reason.
[[nodiscard]] nlohmann::json run_json(const Answer& answer, const GenerateOptions& options);

/// The figures for people: one line in all, one per layer.
[[nodiscard]] std::string run_table(const Answer& answer, const GenerateOptions& options);

/// The picture of a run made with trace_pages; title and marks are the caller's.
[[nodiscard]] PageMapInput run_page_map(const Answer& answer, const GenerateOptions& options);

/// "16,384".
[[nodiscard]] std::string with_thousands(std::int64_t value);

}  // namespace compact::engine
