/// `compact eval recall`: how much of the exact attention mass the lists of selectors read.
#include <fmt/format.h>

#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "engine/cli/commands.h"
#include "engine/cli/eval_flags.h"
#include "engine/cli/prompt_flags.h"
#include "engine/cli/selector_spec.h"
#include "engine/eval/digest.h"
#include "engine/eval/recall.h"
#include "engine/report/progress.h"
#include "engine/report/recall_report.h"

namespace compact::engine {
namespace {

struct RecallFlags {
  std::string model_directory;
  PromptFlags prompts;
  SelectorFlags selectors;
  ReportFiles report;
  GenerateFlags generate;
};

// What a selector may set for itself: all selectors see the same pages.
Result<std::vector<RecallSelector>> make_selectors(const RecallFlags& flags, const SessionOptions& shared) {
  CA_ASSIGN_OR_RETURN(const std::vector<SelectorRun> runs,
                      flags.selectors.resolve(flags.generate, flags.model_directory));
  std::vector<RecallSelector> selectors;
  for (const SelectorRun& run : runs) {
    CA_RETURN_IF_ERROR(check_same_pages(run, shared));
    selectors.push_back({run.label, run.options.sparsity});
  }
  return selectors;
}

Status eval_recall(const RecallFlags& flags) {
  CA_ASSIGN_OR_RETURN(const GenerateOptions shared, flags.generate.resolve(flags.model_directory));
  CA_ASSIGN_OR_RETURN(const std::vector<RecallSelector> selectors, make_selectors(flags, shared));
  CA_RETURN_IF_ERROR(flags.report.check());
  CA_ASSIGN_OR_RETURN(const LoadedModel model, flags.generate.load(flags.model_directory));
  CA_ASSIGN_OR_RETURN(const Prompts prompts, load_prompts(flags.prompts, model));
  EvalConfiguration configuration;
  CA_ASSIGN_OR_RETURN(const std::string digest, model_digest(flags.model_directory));
  configuration.json = {{"measure", "recall"},
                        {"model", digest},
                        {"chat", chat_format_name(model.chat_format)},
                        {"prompts", prompts.configuration},
                        {"options", prefill_flag_values(flags.generate)}};

  const auto cost = [](const RecallPrompt& prompt) { return std::pow(static_cast<double>(prompt.tokens.size()), 2); };
  double total_cost = 0;
  for (const RecallPrompt& prompt : prompts.prompts) total_cost += cost(prompt);
  ProgressBar bar("recall", total_cost);
  ThreadPool pool(flags.generate.threads);
  CA_ASSIGN_OR_RETURN(const std::vector<GroupRecall> groups,
                      measure_recall(
                          *model.transformer, prompts.prompts, selectors, shared, RecallMeasure::kMass,
                          [&](const RecallPrompt& prompt) { bar.advance(cost(prompt), prompt.group); }, pool));
  return flags.report.write(recall_markdown(configuration, groups), recall_json(configuration, groups));
}

}  // namespace

CommandBody add_eval_recall_command(CLI::App& eval) {
  const auto flags = std::make_shared<RecallFlags>();
  CLI::App* command = eval.add_subcommand(
      "recall", "Share of the exact attention mass that selectors read, beside the best lists of the same size");
  add_model_to(*command, flags->model_directory);
  flags->prompts.questions.tasks = {"niah_single_2", "vt"};
  flags->prompts.questions.lengths = {16384};
  flags->prompts.questions.samples = 2;
  flags->selectors.specs = {"mean-key,static"};
  flags->prompts.add_to(*command, "-p,--prompt");
  flags->selectors.add_to(*command);
  flags->report.add_to(*command);
  flags->generate.add_prefill_to(*command);
  return [flags] { return eval_recall(*flags); };
}

}  // namespace compact::engine
