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
#include "engine/cli/files.h"
#include "engine/cli/selector_spec.h"
#include "engine/eval/digest.h"
#include "engine/eval/recall.h"
#include "engine/report/progress.h"
#include "engine/report/recall_report.h"

namespace compact::engine {
namespace {

struct RecallFlags {
  std::string model_directory;
  QuestionFlags questions;
  std::vector<std::string> prompt_files;
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

struct Prompts {
  std::vector<RecallPrompt> prompts;
  nlohmann::json configuration;  // what they were made of
};

Result<Prompts> read_prompts(const RecallFlags& flags, const LoadedModel& model) {
  Prompts result;
  for (const std::string& file : flags.prompt_files) {
    CA_ASSIGN_OR_RETURN(const std::string text, read_text_file(file));
    CA_ASSIGN_OR_RETURN(std::vector<std::int32_t> tokens, encode_prompt(model, text));
    result.prompts.push_back({file, std::move(tokens)});
    result.configuration["files"].push_back(hex_digest(fnv1a64(text)));
  }
  return result;
}

Result<Prompts> generate_prompts(const RecallFlags& flags, const LoadedModel& model) {
  Prompts result;
  const RulerQuestions questions = flags.questions.resolve();
  CA_ASSIGN_OR_RETURN(const SourceFiles sources, SourceFiles::load(flags.questions));
  CA_ASSIGN_OR_RETURN(const RulerTasks tasks, make_ruler_tasks(questions, sources.view(), model));
  CA_ASSIGN_OR_RETURN(result.prompts, recall_prompts(questions, tasks, model));
  result.configuration = sources.digests();
  result.configuration["tasks"] = questions.tasks;
  result.configuration["lengths"] = questions.lengths_tokens;
  result.configuration["samples"] = questions.samples;
  result.configuration["seed"] = questions.seed;
  return result;
}

Status eval_recall(const RecallFlags& flags) {
  CA_ASSIGN_OR_RETURN(const GenerateOptions shared, flags.generate.resolve(flags.model_directory));
  CA_ASSIGN_OR_RETURN(const std::vector<RecallSelector> selectors, make_selectors(flags, shared));
  CA_RETURN_IF_ERROR(flags.report.check());
  CA_ASSIGN_OR_RETURN(const LoadedModel model, load_model(flags.model_directory, flags.generate.chat, shared.backend));
  CA_ASSIGN_OR_RETURN(const Prompts prompts,
                      flags.prompt_files.empty() ? generate_prompts(flags, model) : read_prompts(flags, model));
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
  flags->questions.tasks = {"niah_single_2", "vt"};
  flags->questions.lengths = {16384};
  flags->questions.samples = 2;
  flags->selectors.specs = {"mean-key,static"};
  CLI::Option* files =
      command->add_option("-p,--prompt", flags->prompt_files, "Text files, each a prompt, in place of RULER's tasks");
  for (CLI::Option* option : flags->questions.add_to(*command)) files->excludes(option);
  flags->selectors.add_to(*command);
  flags->report.add_to(*command);
  flags->generate.add_prefill_to(*command);
  return [flags] { return eval_recall(*flags); };
}

}  // namespace compact::engine
