#include "engine/cli/eval_outputs.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "engine/eval/longbench.h"
#include "engine/loader/text_file.h"
#include "engine/report/compare_report.h"
#include "engine/report/eval_report.h"
#include "engine/report/perplexity_report.h"

namespace compact::engine {

void CompareFiles::add_to(CLI::App& command) {
  ReportFiles::add_to(command);
  command.add_option("--svg", svg, "Comparison: draw accuracy against density and time");
  command
      .add_option("--tolerance", tolerance_points, "Comparison: points below dense that still count as equal accuracy")
      ->capture_default_str();
}

Status CompareFiles::check() const {
  CA_RETURN_IF_ERROR(ReportFiles::check());
  if (!svg.empty()) CA_RETURN_IF_ERROR(check_writable(svg));
  if (tolerance_points >= 0 && tolerance_points <= 100) return {};
  return invalid_argument(fmt::format("--tolerance is {}\n  allowed: 0 to 100 points", tolerance_points));
}

Status write_ruler(const ReportFiles& files, const EvalConfiguration& configuration,
                   const std::vector<EvalRecord>& records) {
  if (records.empty()) return io_error("the files hold no answers");
  const std::vector<EvalRow> rows = eval_rows(records, MeanRows::kOverTasks);
  return files.write(eval_markdown(configuration, rows), eval_json(configuration, rows));
}

Status write_longbench(const ReportFiles& files, const EvalConfiguration& configuration,
                       const std::vector<EvalRecord>& records) {
  if (records.empty()) return io_error("the files hold no answers");
  const std::vector<EvalRow> rows = eval_rows(by_longbench_class(records), MeanRows::kNone);
  return files.write(eval_markdown(configuration, rows), eval_json(configuration, rows));
}

Status write_perplexity(const ReportFiles& files, const EvalConfiguration& configuration,
                        const std::vector<PerplexityRecord>& records) {
  if (records.empty()) return io_error("the files hold no windows");
  const std::vector<PerplexityRow> rows = perplexity_rows(records);
  return files.write(perplexity_markdown(configuration, rows), perplexity_json(configuration, rows));
}

Status write_comparison(const CompareFiles& files, const EvalConfiguration& configuration,
                        const std::vector<CompareSetting>& settings, const std::vector<EvalRecord>& records) {
  if (settings.empty()) return io_error("the files hold no setting of a comparison");
  const CompareReport report = compare_rows(settings, records, files.tolerance_points / 100);
  CA_RETURN_IF_ERROR(files.write(compare_markdown(configuration, report), compare_json(configuration, report)));
  if (files.svg.empty()) return {};
  return write_text_file(files.svg, compare_svg(report));
}

}  // namespace compact::engine
