/// `compact eval ruler`: answers of selectors to the same questions.
#include <fmt/format.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "engine/cli/ask_with_progress.h"
#include "engine/cli/commands.h"
#include "engine/cli/eval_flags.h"
#include "engine/cli/eval_outputs.h"
#include "engine/loader/text_file.h"

namespace compact::engine {
namespace {

struct RulerFlags {
  std::string model_directory;
  QuestionFlags questions;
  SelectorFlags selectors;
  std::string final_chunk = "sparse";
  std::string shard = "0/1";
  WorkFlags work;
  std::string prompts;
  ReportFiles report;
  GenerateFlags generate;
};

// What would be asked, for other engines and for a look; no model is run.
Status write_prompts(const RulerFlags& flags, const RulerQuestions& questions, const RulerTasks& tasks,
                     const LoadedModel& model) {
  std::string lines;
  const OnSample add_line = [&](const RulerTask& task, const SampleSeed& seed) -> Status {
    CA_ASSIGN_OR_RETURN(const FittedSample fitted,
                        fit_sample(task, seed, [&](const EvalSample& s) { return encode_sample(model, s); }));
    const nlohmann::json json = {{"task", task.name()},
                                 {"tokens", seed.length_tokens},
                                 {"sample", seed.index},
                                 {"prompt", fitted.sample.prompt},
                                 {"answer_prefix", fitted.sample.answer_prefix},
                                 {"answers", fitted.sample.answers},
                                 {"generate_tokens", task.generate_tokens()},
                                 {"haystack_units", fitted.units},
                                 {"prompt_tokens", fitted.tokens.size()}};
    lines += json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
    return {};
  };
  CA_RETURN_IF_ERROR(for_each_sample(questions, tasks, add_line));
  return write_text_file(flags.prompts, lines);
}

Status evaluate(const RulerFlags& flags, const RulerQuestions& questions, const RulerTasks& tasks,
                const std::vector<SelectorRun>& selectors, const LoadedModel& model,
                const EvalConfiguration& configuration) {
  std::optional<WorkFile> work;
  CA_RETURN_IF_ERROR(flags.work.open(configuration, work));
  ThreadPool pool(flags.generate.threads);
  CA_ASSIGN_OR_RETURN(Answerer answerer, Answerer::create(model, work ? &*work : nullptr, pool));
  CA_RETURN_IF_ERROR(ask_ruler("compact eval ruler", questions, tasks, selectors, model, answerer));
  return write_ruler(flags.report, configuration, answerer.records());
}

Status eval_ruler(const RulerFlags& flags) {
  RulerQuestions questions = flags.questions.resolve();
  CA_ASSIGN_OR_RETURN(questions.shard, parse_shard(flags.shard));
  CA_ASSIGN_OR_RETURN(const std::vector<SelectorRun> selectors,
                      flags.selectors.resolve(flags.generate, flags.model_directory, flags.final_chunk));
  CA_RETURN_IF_ERROR(flags.report.check());
  if (!flags.prompts.empty()) CA_RETURN_IF_ERROR(check_writable(flags.prompts));
  CA_ASSIGN_OR_RETURN(const SourceFiles sources, SourceFiles::load(flags.questions));
  CA_ASSIGN_OR_RETURN(const LoadedModel model, flags.generate.load(flags.model_directory));
  CA_ASSIGN_OR_RETURN(const RulerTasks tasks, make_ruler_tasks(questions, sources.view(), model));
  if (!flags.prompts.empty()) return write_prompts(flags, questions, tasks, model);
  CA_ASSIGN_OR_RETURN(
      const EvalConfiguration configuration,
      ruler_configuration(flags.model_directory, model, flags.questions, sources, flags.final_chunk, flags.generate));
  return evaluate(flags, questions, tasks, selectors, model, configuration);
}

}  // namespace

CommandBody add_eval_ruler_command(CLI::App& eval) {
  const auto flags = std::make_shared<RulerFlags>();
  CLI::App* command = eval.add_subcommand("ruler", "RULER's tasks (arXiv 2404.06654), generated from a seed");
  add_model_to(*command, flags->model_directory);
  flags->questions.add_to(*command);
  flags->selectors.add_to(*command);
  add_final_chunk_to(*command, flags->final_chunk);
  CLI::Option* work = flags->work.add_to(*command);
  add_shard_to(*command, flags->shard);
  command->add_option("--prompts", flags->prompts, "Write the prompts to this file (JSON lines) and answer none")
      ->excludes(work);
  flags->report.add_to(*command);
  flags->generate.add_prefill_to(*command);
  return [flags] { return eval_ruler(*flags); };
}

}  // namespace compact::engine
