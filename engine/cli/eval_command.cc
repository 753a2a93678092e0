/// `compact eval`: selectors compared on equal terms, accuracy beside density and time.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "engine/cli/commands.h"
#include "engine/cli/files.h"
#include "engine/cli/generate_flags.h"
#include "engine/cli/selector_spec.h"
#include "engine/eval/digest.h"
#include "engine/eval/evaluate.h"
#include "engine/report/eval_report.h"
#include "engine/report/progress.h"

namespace compact::engine {
namespace {

constexpr const char* kDefaultEssays = "assets/demo/haystack.txt";
constexpr const char* kDefaultWords = "assets/demo/words.txt";

struct ReportFiles {
  std::string json;
  std::string markdown;

  void add_to(CLI::App& command) {
    command.add_option("--json", json, "Write the figures to this file");
    command.add_option("--markdown", markdown, "Write the table to this file");
  }

  [[nodiscard]] Status check() const {
    for (const std::string& file : {json, markdown}) {
      if (!file.empty()) CA_RETURN_IF_ERROR(check_writable(file));
    }
    return {};
  }

  [[nodiscard]] Status write(const EvalConfiguration& configuration, const std::vector<EvalRecord>& records) const {
    const std::vector<EvalRow> rows = eval_rows(records);
    const std::string table = eval_markdown(configuration, rows);
    fmt::print("{}", table);
    if (!json.empty()) {
      CA_RETURN_IF_ERROR(write_text_file(json, eval_json(configuration, rows).dump(1) + "\n"));
    }
    if (!markdown.empty()) CA_RETURN_IF_ERROR(write_text_file(markdown, table));
    return {};
  }
};

struct RulerFlags {
  std::string model_directory;
  std::vector<std::string> tasks = {"all"};
  std::vector<std::int32_t> lengths = {8192, 16384};
  std::int32_t samples = 100;
  std::uint64_t seed = 42;
  std::string selectors = "dense,mean-key";
  std::string essays = kDefaultEssays;
  std::vector<std::string> words = {kDefaultWords};
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

Result<RulerRun> make_run(const RulerFlags& flags) {
  RulerRun run;
  for (const std::string& item : flags.tasks) {
    for (const std::string& task : split_list(item)) {
      if (task == "all") {
        run.tasks.insert(run.tasks.end(), ruler_task_names().begin(), ruler_task_names().end());
      } else {
        run.tasks.push_back(task);
      }
    }
  }
  if (std::set<std::string>(run.tasks.begin(), run.tasks.end()).size() != run.tasks.size()) {
    return invalid_argument("--tasks names a task twice\n  allowed: each once");
  }
  run.lengths_tokens = flags.lengths;
  if (std::set<std::int32_t>(run.lengths_tokens.begin(), run.lengths_tokens.end()).size() !=
      run.lengths_tokens.size()) {
    return invalid_argument("--lengths names a length twice\n  allowed: each once");
  }
  run.samples = flags.samples;
  run.seed = flags.seed;
  CA_ASSIGN_OR_RETURN(run.shard, parse_shard(flags.shard));
  if (flags.final_chunk != "sparse" && flags.final_chunk != "dense") {
    return invalid_argument(fmt::format("--final-chunk is '{}'\n  allowed: sparse, dense", flags.final_chunk));
  }
  for (const std::string& spec : split_list(flags.selectors)) {
    CA_ASSIGN_OR_RETURN(const GenerateFlags generate, parse_selector_spec(flags.generate, spec));
    CA_ASSIGN_OR_RETURN(GenerateOptions options, generate.resolve());
    options.final_chunk_dense = flags.final_chunk == "dense";
    run.selectors.push_back({spec, std::move(options)});
  }
  return run;
}

Result<EvalConfiguration> make_configuration(const RulerFlags& flags, const Prose& prose, const WordList& words,
                                             const LoadedModel& model) {
  CA_ASSIGN_OR_RETURN(const std::string digest, model_digest(flags.model_directory));
  EvalConfiguration configuration;
  configuration.json = {{"benchmark", "RULER"},
                        {"form", "RULER form"},  // its wording and parameters; the text is known by its digest
                        {"generator", 1},        // changes when the same seed gives other prompts
                        {"model", digest},
                        {"chat", chat_format_name(model.chat_format)},
                        {"seed", flags.seed},
                        {"essays", prose.digest()},
                        {"words", words.digest()},
                        {"final_chunk", flags.final_chunk},
                        {"options", prefill_flag_values(flags.generate)}};
  return configuration;
}

// What would be asked, for other engines and for a look; no model is run.
Status write_prompts(const RulerFlags& flags, const RulerRun& run, const RulerTasks& tasks, const LoadedModel& model) {
  std::string lines;
  for (std::size_t at = 0; at < run.lengths_tokens.size(); ++at) {
    for (const auto& task : tasks[at]) {
      for (std::int32_t index = run.shard.index; index < run.samples; index += run.shard.count) {
        const SampleSeed seed{run.seed, task->name(), run.lengths_tokens[at], index};
        CA_ASSIGN_OR_RETURN(const FittedSample fitted,
                            fit_sample(*task, seed, [&](const EvalSample& s) { return encode_sample(model, s); }));
        const nlohmann::json json = {{"task", task->name()},
                                     {"tokens", seed.length_tokens},
                                     {"sample", index},
                                     {"prompt", fitted.sample.prompt},
                                     {"answer_prefix", fitted.sample.answer_prefix},
                                     {"answers", fitted.sample.answers},
                                     {"generate_tokens", task->generate_tokens()},
                                     {"prompt_tokens", fitted.tokens.size()}};
        lines += json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
      }
    }
  }
  return write_text_file(flags.prompts, lines);
}

Status evaluate(const RulerFlags& flags, const RulerRun& run, const RulerTasks& tasks, const LoadedModel& model,
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
  for (const std::int32_t length : run.lengths_tokens) {
    for (const std::string& task : run.tasks) {
      for (std::int32_t index = run.shard.index; index < run.samples; index += run.shard.count) {
        for (const SelectorRun& selector : run.selectors) {
          if (done.contains({task, length, index, selector.label})) continue;
          total_cost += cost(length);
          ++total;
        }
      }
    }
  }
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
                      evaluate_ruler(run, tasks, model, work ? &*work : nullptr, on_record, pool));
  return flags.report.write(configuration, records);
}

Status eval_ruler(const RulerFlags& flags) {
  CA_ASSIGN_OR_RETURN(const RulerRun run, make_run(flags));
  CA_RETURN_IF_ERROR(flags.report.check());
  CA_ASSIGN_OR_RETURN(const Prose prose, Prose::load(flags.essays));
  CA_ASSIGN_OR_RETURN(const WordList words, WordList::load({flags.words.begin(), flags.words.end()}));
  CA_ASSIGN_OR_RETURN(const LoadedModel model, load_model(flags.model_directory, flags.generate.chat));
  CA_ASSIGN_OR_RETURN(const RulerTasks tasks, make_ruler_tasks(run, {&prose, &words}, model));
  if (!flags.prompts.empty()) return write_prompts(flags, run, tasks, model);
  CA_ASSIGN_OR_RETURN(const EvalConfiguration configuration, make_configuration(flags, prose, words, model));
  return evaluate(flags, run, tasks, model, configuration);
}

Status eval_merge(const MergeFlags& flags) {
  CA_RETURN_IF_ERROR(flags.report.check());
  CA_ASSIGN_OR_RETURN(const WorkFileContents contents, merge_work_files({flags.files.begin(), flags.files.end()}));
  if (contents.records.empty()) return io_error("the files hold no answers");
  return flags.report.write(contents.configuration, contents.records);
}

std::pair<CLI::App*, CommandBody> add_ruler(CLI::App& eval) {
  const auto flags = std::make_shared<RulerFlags>();
  CLI::App* command = eval.add_subcommand("ruler", "RULER's tasks (arXiv 2404.06654), generated from a seed");
  command
      ->add_option("-m,--model", flags->model_directory, "Model directory: config.json, *.safetensors, tokenizer.json")
      ->required();
  command->add_option("--tasks", flags->tasks, fmt::format("all, or of: {}", fmt::join(ruler_task_names(), " ")))
      ->capture_default_str();
  command->add_option("--lengths", flags->lengths, "Tokens of prompt and answer together")->capture_default_str();
  command->add_option("--samples", flags->samples, "Samples of each task and length")->capture_default_str();
  command->add_option("--seed", flags->seed, "Seed of the prompts")->capture_default_str();
  command
      ->add_option("--selector", flags->selectors,
                   "Selectors to compare, e.g. dense,mean-key,mean-key:share=0.1; known: " + selector_names())
      ->capture_default_str();
  command->add_option("--essays", flags->essays, "Text file with the haystack's prose")->capture_default_str();
  command
      ->add_option("--words", flags->words,
                   "Words for keys, one a line; two files: first halves (adjectives) and second halves (nouns)")
      ->capture_default_str();
  command
      ->add_option("--final-chunk", flags->final_chunk,
                   "The prompt's last chunk, which holds the question: sparse or dense")
      ->capture_default_str();
  command->add_option("--work", flags->work, "Write every answer to this file as it comes (JSON lines)");
  command->add_flag("--resume", flags->resume, "Go on with the --work file of an earlier run");
  command->add_option("--shard", flags->shard, "I/N: answer every N-th sample from I on; `eval merge` joins the files")
      ->capture_default_str();
  command->add_option("--prompts", flags->prompts, "Write the prompts to this file (JSON lines) and run no model");
  flags->report.add_to(*command);
  flags->generate.add_prefill_to(*command);
  return {command, [flags] { return eval_ruler(*flags); }};
}

std::pair<CLI::App*, CommandBody> add_merge(CLI::App& eval) {
  const auto flags = std::make_shared<MergeFlags>();
  CLI::App* command = eval.add_subcommand("merge", "One table from the --work files of several runs or shards");
  command->add_option("files", flags->files, "Files that --work wrote")->required();
  flags->report.add_to(*command);
  return {command, [flags] { return eval_merge(*flags); }};
}

}  // namespace

CommandBody add_eval_command(CLI::App& app) {
  CLI::App* eval = app.add_subcommand("eval", "Compare selectors: accuracy beside density and time");
  eval->require_subcommand(1);
  const std::vector<std::pair<CLI::App*, CommandBody>> commands = {add_ruler(*eval), add_merge(*eval)};
  return [commands]() -> Status {
    for (const auto& [command, body] : commands) {
      if (command->parsed()) return body();
    }
    return {};
  };
}

}  // namespace compact::engine
