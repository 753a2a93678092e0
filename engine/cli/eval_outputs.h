/// What the commands of `compact eval` write in the end: each on its own, and `eval merge` for the files of several.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "compact/status.h"
#include "engine/cli/eval_flags.h"
#include "engine/eval/comparison.h"
#include "engine/eval/perplexity.h"
#include "engine/eval/record.h"

namespace compact::engine {

/// Under "benchmark" in a configuration.
inline constexpr const char* kRuler = "RULER";
inline constexpr const char* kComparison = "RULER comparison";
inline constexpr const char* kLongBench = "LongBench v2";
inline constexpr const char* kPerplexity = "perplexity";

/// Files of a comparison.
struct CompareFiles : ReportFiles {
  std::string svg;
  double tolerance_points = 1;

  void add_to(CLI::App& command);
  /// Errors: those of ReportFiles::check; kInvalidArgument for a tolerance outside 0 to 100.
  [[nodiscard]] Status check() const;
};

/// Tables on standard output, and the files asked for. Errors: those of the files; kIoError if there is nothing to
/// write.
[[nodiscard]] Status write_ruler(const ReportFiles& files, const EvalConfiguration& configuration,
                                 const std::vector<EvalRecord>& records);
[[nodiscard]] Status write_longbench(const ReportFiles& files, const EvalConfiguration& configuration,
                                     const std::vector<EvalRecord>& records);
[[nodiscard]] Status write_perplexity(const ReportFiles& files, const EvalConfiguration& configuration,
                                      const std::vector<PerplexityRecord>& records);
[[nodiscard]] Status write_comparison(const CompareFiles& files, const EvalConfiguration& configuration,
                                      const std::vector<CompareSetting>& settings,
                                      const std::vector<EvalRecord>& records);

}  // namespace compact::engine
