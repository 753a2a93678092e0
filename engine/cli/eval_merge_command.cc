/// `compact eval merge`: one table from the work files of several runs, shards or machines.
#include <fmt/format.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/cli/commands.h"
#include "engine/cli/eval_outputs.h"
#include "engine/eval/work_file.h"

namespace compact::engine {
namespace {

struct MergeFlags {
  std::vector<std::string> files;
  CompareFiles report;
};

Status eval_merge(const MergeFlags& flags) {
  CA_RETURN_IF_ERROR(flags.report.check());
  CA_ASSIGN_OR_RETURN(const WorkFileContents contents, merge_work_files({flags.files.begin(), flags.files.end()}));
  const EvalConfiguration& configuration = contents.configuration;
  const nlohmann::json benchmark = configuration.json.value("benchmark", nlohmann::json());
  if (benchmark != kComparison && !flags.report.svg.empty()) {
    return invalid_argument("--svg: these are no files of a comparison\n  allowed: files that `eval compare` wrote");
  }
  if (benchmark == kPerplexity) {
    CA_ASSIGN_OR_RETURN(const std::vector<PerplexityRecord> windows, windows_of(contents.lines));
    return write_perplexity(flags.report, configuration, windows);
  }
  CA_ASSIGN_OR_RETURN(const std::vector<EvalRecord> records, answers_of(contents.lines));
  if (benchmark == kRuler) return write_ruler(flags.report, configuration, records);
  if (benchmark == kLongBench) return write_longbench(flags.report, configuration, records);
  if (benchmark == kComparison) {
    CA_ASSIGN_OR_RETURN(const std::vector<CompareSetting> settings, settings_of(contents.lines));
    return write_comparison(flags.report, configuration, settings, records);
  }
  return io_error(fmt::format("the files are of benchmark {}\n  allowed: {}, {}, {}, {}", benchmark.dump(), kRuler,
                              kComparison, kLongBench, kPerplexity));
}

}  // namespace

CommandBody add_eval_merge_command(CLI::App& eval) {
  const auto flags = std::make_shared<MergeFlags>();
  CLI::App* command = eval.add_subcommand("merge", "One table from the --work files of several runs or shards");
  command->add_option("files", flags->files, "Files that --work wrote")->required();
  flags->report.add_to(*command);
  return [flags] { return eval_merge(*flags); };
}

}  // namespace compact::engine
