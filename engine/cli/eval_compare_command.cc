/// `compact eval compare`: selectors at equal density and at equal accuracy, in one table.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine/cli/ask_with_progress.h"
#include "engine/cli/commands.h"
#include "engine/cli/eval_flags.h"
#include "engine/cli/eval_outputs.h"
#include "engine/eval/comparison.h"
#include "engine/report/progress.h"

namespace compact::engine {
namespace {

struct CompareFlags {
  std::string model_directory;
  QuestionFlags questions;
  SelectorFlags selectors;
  std::vector<double> densities = {0.1, 0.2, 0.4};
  std::vector<std::string> fit_tasks;
  std::int32_t fit_samples = 1;
  std::string final_chunk = "sparse";
  std::string shard = "0/1";
  WorkFlags work;
  CompareFiles files;
  GenerateFlags generate;
};

// What is fitted and asked.
struct Plan {
  RulerQuestions questions;
  RulerQuestions fit_questions;
  std::vector<SweepSpec> selectors;
  SessionOptions shared;
};

Result<Plan> make_plan(const CompareFlags& flags) {
  Plan plan;
  plan.questions = flags.questions.resolve();
  CA_ASSIGN_OR_RETURN(plan.questions.shard, parse_shard(flags.shard));
  plan.fit_questions = plan.questions;
  plan.fit_questions.shard = {};
  plan.fit_questions.samples = flags.fit_samples;
  plan.fit_questions.seed = flags.questions.seed + 1;  // not what is asked
  if (!flags.fit_tasks.empty()) plan.fit_questions.tasks = split_tasks(flags.fit_tasks);
  for (const double density : flags.densities) {
    if (!(density > 0 && density < 1)) {
      return invalid_argument(fmt::format("--densities: {}\n  allowed: above 0, below 1", density));
    }
  }
  CA_ASSIGN_OR_RETURN(const GenerateOptions shared, flags.generate.resolve(flags.model_directory));
  plan.shared = shared;
  CA_ASSIGN_OR_RETURN(std::vector<std::string> specs, flags.selectors.split());
  // Accuracy is told beside dense's.
  if (std::find(specs.begin(), specs.end(), "dense") == specs.end()) specs.insert(specs.begin(), "dense");
  for (const std::string& text : specs) {
    CA_ASSIGN_OR_RETURN(SweepSpec spec, SweepSpec::parse(text));
    // A mistake in a spec should not cost the time to load.
    const std::vector<double> first = spec.names_target() ? flags.densities : spec.first_values(shared.page_tokens, 1);
    CA_ASSIGN_OR_RETURN(const SelectorRun run,
                        resolve_selector(flags.generate, flags.model_directory,
                                         spec.at(first.front(), shared.page_tokens), flags.final_chunk));
    CA_RETURN_IF_ERROR(check_same_pages(run, shared));
    plan.selectors.push_back(std::move(spec));
  }
  return plan;
}

class Comparison {
 public:
  Comparison(const CompareFlags& flags, const Plan& plan, const SourceFiles& sources, const LoadedModel& model)
      : flags_(flags), plan_(plan), sources_(sources), model_(model), pool_(flags.generate.threads) {}

  [[nodiscard]] Status run() {
    CA_ASSIGN_OR_RETURN(EvalConfiguration configuration,
                        ruler_configuration(flags_.model_directory, model_, flags_.questions, sources_,
                                            flags_.final_chunk, flags_.generate));
    configuration.json["benchmark"] = kComparison;
    configuration.json["fit"] = {{"tasks", plan_.fit_questions.tasks}, {"samples", plan_.fit_questions.samples}};
    CA_RETURN_IF_ERROR(flags_.work.open(configuration, work_));
    CA_ASSIGN_OR_RETURN(Answerer answerer, Answerer::create(model_, work_ ? &*work_ : nullptr, pool_));
    if (work_) {
      CA_ASSIGN_OR_RETURN(settings_, settings_of(work_->resumed()));
    }
    for (const std::int32_t length : plan_.questions.lengths_tokens) {
      CA_RETURN_IF_ERROR(fit(length));
      if (plan_.questions.samples > 0) CA_RETURN_IF_ERROR(ask(length, answerer));
    }
    return write_comparison(flags_.files, configuration, settings_, answerer.records());
  }

 private:
  [[nodiscard]] bool has(std::int32_t length, const std::string& selector, double target) const {
    return std::any_of(settings_.begin(), settings_.end(), [&](const CompareSetting& setting) {
      return setting.length_tokens == length && setting.selector == selector && setting.target == target;
    });
  }

  // Fits what the work file has not.
  [[nodiscard]] Status fit(std::int32_t length) {
    std::vector<SweepSpec> missing;
    for (const SweepSpec& selector : plan_.selectors) {
      const std::vector<double> targets = selector.swept() ? flags_.densities : std::vector<double>{0};
      const bool all = std::all_of(targets.begin(), targets.end(),
                                   [&](double target) { return has(length, selector.text(), target); });
      if (!all) missing.push_back(selector);
    }
    if (missing.empty()) return {};
    RulerQuestions questions = plan_.fit_questions;
    questions.lengths_tokens = {length};
    CA_ASSIGN_OR_RETURN(const RulerTasks tasks, make_ruler_tasks(questions, sources_.view(), model_));
    CA_ASSIGN_OR_RETURN(std::vector<RecallPrompt> prompts, recall_prompts(questions, tasks, model_));
    for (RecallPrompt& prompt : prompts) prompt.group = "fit";
    ProgressBar bar("fit", kFitPasses * static_cast<double>(prompts.size()));
    const FitInput input{.model = *model_.transformer,
                         .prompts = prompts,
                         .length_tokens = length,
                         .session = plan_.shared,
                         .targets = flags_.densities,
                         .make = [this](const std::string& spec) -> Result<SparsityOptions> {
                           CA_ASSIGN_OR_RETURN(
                               const SelectorRun run,
                               resolve_selector(flags_.generate, flags_.model_directory, spec, flags_.final_chunk));
                           return run.options.sparsity;
                         },
                         .on_prompt = [&](const RecallPrompt&) { bar.advance(1, fmt::format("{} tokens", length)); }};
    CA_ASSIGN_OR_RETURN(const std::vector<CompareSetting> fitted, fit_settings(input, missing, pool_));
    for (const CompareSetting& setting : fitted) {
      if (has(length, setting.selector, setting.target)) continue;  // of an earlier run with fewer densities
      if (work_) CA_RETURN_IF_ERROR(work_->append(to_json(setting)));
      settings_.push_back(setting);
    }
    return {};
  }

  [[nodiscard]] Status ask(std::int32_t length, Answerer& answerer) {
    std::set<std::string> specs;
    std::vector<SelectorRun> selectors;
    for (const CompareSetting& setting : settings_) {
      if (setting.length_tokens != length || !asked(setting) || !specs.insert(setting.spec).second) continue;
      CA_ASSIGN_OR_RETURN(SelectorRun run,
                          resolve_selector(flags_.generate, flags_.model_directory, setting.spec, flags_.final_chunk));
      selectors.push_back(std::move(run));
    }
    RulerQuestions questions = plan_.questions;
    questions.lengths_tokens = {length};
    CA_ASSIGN_OR_RETURN(const RulerTasks tasks, make_ruler_tasks(questions, sources_.view(), model_));
    return ask_ruler(fmt::format("compact eval compare, {} tokens", length), questions, tasks, selectors, model_,
                     answerer);
  }

  // A work file may hold settings of selectors and densities that this run does not name.
  [[nodiscard]] bool asked(const CompareSetting& setting) const {
    const bool named = std::any_of(plan_.selectors.begin(), plan_.selectors.end(),
                                   [&](const SweepSpec& selector) { return selector.text() == setting.selector; });
    const auto& densities = flags_.densities;
    return named &&
           (setting.target == 0 || std::find(densities.begin(), densities.end(), setting.target) != densities.end());
  }

  const CompareFlags& flags_;
  const Plan& plan_;
  const SourceFiles& sources_;
  const LoadedModel& model_;
  ThreadPool pool_;
  std::optional<WorkFile> work_;
  std::vector<CompareSetting> settings_;
};

Status eval_compare(const CompareFlags& flags) {
  CA_ASSIGN_OR_RETURN(const Plan plan, make_plan(flags));
  CA_RETURN_IF_ERROR(flags.files.check());
  CA_ASSIGN_OR_RETURN(const SourceFiles sources, SourceFiles::load(flags.questions));
  CA_ASSIGN_OR_RETURN(const LoadedModel model, flags.generate.load(flags.model_directory));
  return Comparison(flags, plan, sources, model).run();
}

}  // namespace

CommandBody add_eval_compare_command(CLI::App& eval) {
  const auto flags = std::make_shared<CompareFlags>();
  CLI::App* command = eval.add_subcommand(
      "compare", "Selectors at equal density and at equal accuracy: recall, RULER, time and memory in one table");
  add_model_to(*command, flags->model_directory);
  flags->questions.tasks = {"niah_multikey_1,niah_multivalue,vt,fwe"};
  flags->questions.lengths = {8192};
  flags->questions.samples = 5;
  flags->questions.add_to(*command);
  flags->selectors.specs = {
      "dense,random:budget=top={},static:window={},quoka:budget=top={},xattention:mass={},mean-key:budget=density={},"
      "sub-mean:budget=density={},oracle:budget=density={}"};
  flags->selectors.add_to(*command);
  command->add_option("--densities", flags->densities, "Densities, after the union, that every {} is fitted to")
      ->capture_default_str();
  command->add_option("--fit-tasks", flags->fit_tasks, "Tasks whose prompts are fitted on; default: those of --tasks");
  command->add_option("--fit-samples", flags->fit_samples, "Fitting prompts of each task and length")
      ->capture_default_str();
  add_final_chunk_to(*command, flags->final_chunk);
  flags->work.add_to(*command);
  add_shard_to(*command, flags->shard);
  flags->files.add_to(*command);
  // Every chunk is the selector's, so that the density fitted is the density read.
  flags->generate.options.sparsity.crossover.min_context_tokens = 0;
  flags->generate.add_prefill_to(*command);
  return [flags] { return eval_compare(*flags); };
}

}  // namespace compact::engine
