/// Selectors at equal density and at equal accuracy: one table each, and a picture.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "engine/eval/comparison.h"
#include "engine/eval/record.h"
#include "engine/report/eval_report.h"

namespace compact::engine {

/// A setting with what it answered.
struct CompareRow {
  CompareSetting setting;
  std::vector<EvalRow> tasks;   // in the order of CompareReport::tasks; fewer if answers are missing
  std::optional<EvalRow> mean;  // over the tasks; not there without answers
  bool is_dense = false;

  [[nodiscard]] double density() const { return mean ? mean->stats.density() : setting.density; }
  [[nodiscard]] double union_inflation() const {
    return mean ? mean->stats.union_inflation() : setting.union_inflation;
  }
};

struct CompareReport {
  std::vector<std::string> tasks;
  std::vector<CompareRow> rows;  // by length, then wanted density, then selector as given; `dense` before all
  double tolerance = 0;          // 0 to 1: how far below dense still counts as equal
};

[[nodiscard]] CompareReport compare_rows(const std::vector<CompareSetting>& settings,
                                         const std::vector<EvalRecord>& records, double tolerance);

/// Of each length and selector the setting of least density whose mean is at most the tolerance below dense's on the
/// same samples; null where none is.
struct EqualAccuracy {
  std::int32_t length_tokens = 0;
  std::string selector;
  const CompareRow* row = nullptr;
  const CompareRow* dense = nullptr;
};
[[nodiscard]] std::vector<EqualAccuracy> equal_accuracy(const CompareReport& report);

/// Keys: configuration, digest, tasks, tolerance, rows (one each setting), equal_accuracy.
[[nodiscard]] nlohmann::json compare_json(const EvalConfiguration& configuration, const CompareReport& report);
[[nodiscard]] std::string compare_markdown(const EvalConfiguration& configuration, const CompareReport& report);

/// Accuracy against density and against the time of a step, a row of panels for each length. Without answers recall
/// stands in for accuracy, and there is no panel of time.
[[nodiscard]] std::string compare_svg(const CompareReport& report);

}  // namespace compact::engine
