/// `compact eval ruler` and `compact eval merge`: answers of selectors to the same questions.
#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "engine/cli/commands.h"
#include "engine/cli/eval_flags.h"
#include "engine/cli/files.h"
#include "engine/cli/selector_spec.h"
#include "engine/eval/digest.h"
#include "engine/report/eval_report.h"
#include "engine/report/progress.h"

namespace compact::engine {
namespace {

struct RulerFlags {
  std::string model_directory;
  QuestionFlags questions;
  SelectorFlags selectors;
  std::string final_chunk = "sparse";
  std::string shard = "0/1";
  std::string work;
  bool resume = false;
  std::string prompts;
  ReportFiles report;
  GenerateFlags generate;
};

struct MergeFlags {
  std::vector<std::string> files;
  ReportFiles report;
};

// "3/16".
Result<Shard> parse_shard(const std::string& text) {
  Shard shard;
  int used = 0;
  if (std::sscanf(text.c_str(), "%d/%d%n", &shard.index, &shard.count, &used) == 2 &&
      used == static_cast<int>(text.size())) {
    return shard;
  }
  return invalid_argument(fmt::format("--shard is '{}'\n  allowed: I/N with I from 0 to N - 1, e.g. 0/4", text));
}

Result<std::vector<SelectorRun>> make_selectors(const RulerFlags& flags) {
  if (flags.final_chunk != "sparse" && flags.final_chunk != "dense") {
    return invalid_argument(fmt::format("--final-chunk is '{}'\n  allowed: sparse, dense", flags.final_chunk));
  }
  CA_ASSIGN_OR_RETURN(std::vector<SelectorRun> selectors, flags.selectors.resolve(flags.generate));
  for (SelectorRun& selector : selectors) selector.options.final_chunk_dense = flags.final_chunk == "dense";
  return selectors;
}

Result<EvalConfiguration> make_configuration(const RulerFlags& flags, const SourceFiles& sources,
                                             const LoadedModel& model) {
  CA_ASSIGN_OR_RETURN(const std::string digest, model_digest(flags.model_directory));
  EvalConfiguration configuration;
  configuration.json = {{"benchmark", "RULER"},
                        {"form", "RULER form"},  // its wording and parameters; the text is known by its digest
                        {"generator", 1},        // changes when the same seed gives other prompts
                        {"model", digest},
                        {"chat", chat_format_name(model.chat_format)},
                        {"seed", flags.questions.seed},
                        {"final_chunk", flags.final_chunk},
                        {"options", prefill_flag_values(flags.generate)}};
  configuration.json.update(sources.digests());
  return configuration;
}

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

Status write_report(const ReportFiles& files, const EvalConfiguration& configuration,
                    const std::vector<EvalRecord>& records) {
  const std::vector<EvalRow> rows = eval_rows(records);
  return files.write(eval_markdown(configuration, rows), eval_json(configuration, rows));
}

Status evaluate(const RulerFlags& flags, const RulerQuestions& questions, const RulerTasks& tasks,
                const std::vector<SelectorRun>& selectors, const LoadedModel& model,
                const EvalConfiguration& configuration) {
  std::optional<WorkFile> work;
  if (!flags.work.empty()) {
    CA_ASSIGN_OR_RETURN(work, WorkFile::open(flags.work, configuration, flags.resume));
  }
  // Attention grows with the square of the length, the rest evenly; both are about equal at 4096 tokens.
  const auto cost = [](std::int32_t tokens) { return static_cast<double>(tokens) * (tokens + 4096.0); };
  std::set<EvalRecord::Key> done;
  if (work) {
    for (const EvalRecord& record : work->resumed()) done.insert(record.key());
  }
  double total_cost = 0;
  std::int64_t total = 0;
  const OnSample count = [&](const RulerTask&, const SampleSeed& seed) -> Status {
    for (const SelectorRun& selector : selectors) {
      if (done.contains({std::string(seed.task), seed.length_tokens, seed.index, selector.label})) continue;
      total_cost += cost(seed.length_tokens);
      ++total;
    }
    return {};
  };
  CA_RETURN_IF_ERROR(for_each_sample(questions, tasks, count));
  fmt::print(stderr, "compact eval ruler: {} answers to give ({} resumed), configuration {}\n", total, done.size(),
             configuration.digest());
  ProgressBar bar("eval", total_cost);
  std::int64_t answered = 0;
  const bool on_terminal = isatty(STDERR_FILENO) != 0;
  const auto on_record = [&](const EvalRecord& record) {
    bar.advance(cost(record.length_tokens),
                fmt::format("{} {} #{} {}", record.task, record.length_tokens, record.index, record.selector));
    // A log gets a line now and then instead.
    if (++answered % 100 == 0 && !on_terminal) fmt::print(stderr, "{} / {} answers\n", answered, total);
  };
  ThreadPool pool(flags.generate.threads);
  CA_ASSIGN_OR_RETURN(const std::vector<EvalRecord> records,
                      evaluate_ruler(questions, tasks, selectors, model, work ? &*work : nullptr, on_record, pool));
  return write_report(flags.report, configuration, records);
}

Status eval_ruler(const RulerFlags& flags) {
  RulerQuestions questions = flags.questions.resolve();
  CA_ASSIGN_OR_RETURN(questions.shard, parse_shard(flags.shard));
  CA_ASSIGN_OR_RETURN(const std::vector<SelectorRun> selectors, make_selectors(flags));
  CA_RETURN_IF_ERROR(flags.report.check());
  if (!flags.prompts.empty()) CA_RETURN_IF_ERROR(check_writable(flags.prompts));
  CA_ASSIGN_OR_RETURN(const SourceFiles sources, SourceFiles::load(flags.questions));
  CA_ASSIGN_OR_RETURN(const LoadedModel model,
                      load_model(flags.model_directory, flags.generate.chat, selectors.front().options.backend));
  CA_ASSIGN_OR_RETURN(const RulerTasks tasks, make_ruler_tasks(questions, sources.view(), model));
  if (!flags.prompts.empty()) return write_prompts(flags, questions, tasks, model);
  CA_ASSIGN_OR_RETURN(const EvalConfiguration configuration, make_configuration(flags, sources, model));
  return evaluate(flags, questions, tasks, selectors, model, configuration);
}

Status eval_merge(const MergeFlags& flags) {
  CA_RETURN_IF_ERROR(flags.report.check());
  CA_ASSIGN_OR_RETURN(const WorkFileContents contents, merge_work_files({flags.files.begin(), flags.files.end()}));
  if (contents.records.empty()) return io_error("the files hold no answers");
  return write_report(flags.report, contents.configuration, contents.records);
}

}  // namespace

CommandBody add_eval_ruler_command(CLI::App& eval) {
  const auto flags = std::make_shared<RulerFlags>();
  CLI::App* command = eval.add_subcommand("ruler", "RULER's tasks (arXiv 2404.06654), generated from a seed");
  add_model_to(*command, flags->model_directory);
  flags->questions.add_to(*command);
  flags->selectors.add_to(*command);
  command
      ->add_option("--final-chunk", flags->final_chunk,
                   "The prompt's last chunk, which holds the question: sparse or dense")
      ->capture_default_str();
  CLI::Option* work =
      command->add_option("--work", flags->work, "Write every answer to this file as it comes (JSON lines)");
  command->add_flag("--resume", flags->resume, "Go on with the --work file of an earlier run");
  command->add_option("--shard", flags->shard, "I/N: answer every N-th sample from I on; `eval merge` joins the files")
      ->capture_default_str();
  command->add_option("--prompts", flags->prompts, "Write the prompts to this file (JSON lines) and answer none")
      ->excludes(work);
  flags->report.add_to(*command);
  flags->generate.add_prefill_to(*command);
  return [flags] { return eval_ruler(*flags); };
}

CommandBody add_eval_merge_command(CLI::App& eval) {
  const auto flags = std::make_shared<MergeFlags>();
  CLI::App* command = eval.add_subcommand("merge", "One table from the --work files of several runs or shards");
  command->add_option("files", flags->files, "Files that --work wrote")->required();
  flags->report.add_to(*command);
  return [flags] { return eval_merge(*flags); };
}

}  // namespace compact::engine
