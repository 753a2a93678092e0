#include "engine/cli/eval_flags.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "engine/cli/eval_outputs.h"
#include "engine/cli/selector_spec.h"
#include "engine/eval/digest.h"
#include "engine/loader/text_file.h"

namespace compact::engine {
namespace {

constexpr const char* kDefaultEssays = "assets/demo/haystack.txt";
constexpr const char* kDefaultWords = "assets/demo/words.txt";

}  // namespace

void ReportFiles::add_to(CLI::App& command) {
  command.add_option("--json", json, "Write the figures to this file");
  command.add_option("--markdown", markdown, "Write the table to this file");
}

Status ReportFiles::check() const {
  for (const std::string& file : {json, markdown}) {
    if (!file.empty()) CA_RETURN_IF_ERROR(check_writable(file));
  }
  return {};
}

Status ReportFiles::write(const std::string& table, const nlohmann::json& figures) const {
  fmt::print("{}", table);
  if (!json.empty()) CA_RETURN_IF_ERROR(write_text_file(json, figures.dump(1) + "\n"));
  if (!markdown.empty()) CA_RETURN_IF_ERROR(write_text_file(markdown, table));
  return {};
}

CLI::Option* WorkFlags::add_to(CLI::App& command) {
  CLI::Option* option = command.add_option("--work", file, "Write what is found to this file as it comes (JSON lines)");
  command.add_flag("--resume", resume, "Go on with the --work file of an earlier run");
  return option;
}

Status WorkFlags::open(const EvalConfiguration& configuration, std::optional<WorkFile>& work) const {
  if (file.empty()) return {};
  CA_ASSIGN_OR_RETURN(work, WorkFile::open(file, configuration, resume));
  return {};
}

void add_shard_to(CLI::App& command, std::string& text) {
  command.add_option("--shard", text, "I/N: answer every N-th sample from I on; `eval merge` joins the files")
      ->capture_default_str();
}

// "3/16".
Result<Shard> parse_shard(const std::string& text) {
  Shard shard;
  int used = 0;
  const bool is_pair = std::sscanf(text.c_str(), "%d/%d%n", &shard.index, &shard.count, &used) == 2 &&
                       used == static_cast<int>(text.size());
  if (is_pair && shard.index >= 0 && shard.index < shard.count) return shard;
  return invalid_argument(fmt::format("--shard is '{}'\n  allowed: I/N with I from 0 to N - 1, e.g. 0/4", text));
}

std::vector<CLI::Option*> QuestionFlags::add_to(CLI::App& command) {
  return {command
              .add_option("--tasks", tasks,
                          fmt::format("generated (all but qa), all, or of: {}", fmt::join(ruler_task_names(), " ")))
              ->capture_default_str(),
          command.add_option("--lengths", lengths, "Tokens of prompt and answer together")->capture_default_str(),
          command.add_option("--samples", samples, "Samples of each task and length")->capture_default_str(),
          command.add_option("--seed", seed, "Seed of the prompts")->capture_default_str(),
          command.add_option("--essays", essays, "Text file with the haystack's prose")->default_str(kDefaultEssays),
          command
              .add_option("--words", words,
                          "Words for keys, one a line; two files: first halves (adjectives) and second halves (nouns)")
              ->default_str(kDefaultWords),
          command.add_option("--qa-1", qa_1, "Questions of task qa_1: SQuAD 2.0, dev-v2.0.json"),
          command.add_option("--qa-2", qa_2, "Questions of task qa_2: HotpotQA, hotpot_dev_distractor_v1.json")};
}

std::vector<std::string> split_tasks(const std::vector<std::string>& items) {
  std::vector<std::string> tasks;
  for (const std::string& item : items) {
    for (const std::string& task : split_list(item)) {
      std::vector<std::string> names = {task};
      if (task == "all") names = ruler_task_names();
      if (task == "generated") names = generated_ruler_task_names();
      tasks.insert(tasks.end(), names.begin(), names.end());
    }
  }
  return tasks;
}

RulerQuestions QuestionFlags::resolve() const {
  RulerQuestions questions;
  questions.tasks = split_tasks(tasks);
  questions.lengths_tokens = lengths;
  questions.samples = samples;
  questions.seed = seed;
  return questions;
}

Result<SourceFiles> SourceFiles::load(const QuestionFlags& flags) {
  SourceFiles files;
  if (!flags.essays.empty() || std::filesystem::exists(kDefaultEssays)) {
    CA_ASSIGN_OR_RETURN(files.prose_, Prose::load(flags.essays.empty() ? kDefaultEssays : flags.essays));
  }
  if (!flags.words.empty()) {
    CA_ASSIGN_OR_RETURN(files.words_, WordList::load({flags.words.begin(), flags.words.end()}));
  } else if (std::filesystem::exists(kDefaultWords)) {
    CA_ASSIGN_OR_RETURN(files.words_, WordList::load({kDefaultWords}));
  }
  if (!flags.qa_1.empty()) {
    CA_ASSIGN_OR_RETURN(files.qa_1_, QuestionSet::load(flags.qa_1));
  }
  if (!flags.qa_2.empty()) {
    CA_ASSIGN_OR_RETURN(files.qa_2_, QuestionSet::load(flags.qa_2));
  }
  return files;
}

RulerSources SourceFiles::view() const {
  const auto pointer = [](const auto& source) { return source ? &*source : nullptr; };
  return {pointer(prose_), pointer(words_), pointer(qa_1_), pointer(qa_2_)};
}

nlohmann::json SourceFiles::digests() const {
  const auto digest = [](const auto& source) { return source ? source->digest() : std::string("none"); };
  return {{"essays", digest(prose_)}, {"words", digest(words_)}, {"qa_1", digest(qa_1_)}, {"qa_2", digest(qa_2_)}};
}

void SelectorFlags::add_to(CLI::App& command) {
  command
      .add_option("--selector", specs,
                  "Selectors to compare, e.g. dense,mean-key,mean-key:share=0.1; known: " + selector_names())
      ->capture_default_str();
}

void add_final_chunk_to(CLI::App& command, std::string& text) {
  command.add_option("--final-chunk", text, "The prompt's last chunk, which holds the question: sparse or dense")
      ->capture_default_str();
}

Result<SelectorRun> resolve_selector(const GenerateFlags& base, const std::string& model_directory,
                                     const std::string& spec, const std::string& final_chunk) {
  if (final_chunk != "sparse" && final_chunk != "dense") {
    return invalid_argument(fmt::format("--final-chunk is '{}'\n  allowed: sparse, dense", final_chunk));
  }
  CA_ASSIGN_OR_RETURN(const GenerateFlags generate, parse_selector_spec(base, spec));
  CA_ASSIGN_OR_RETURN(GenerateOptions options, generate.resolve(model_directory));
  options.final_chunk_dense = final_chunk == "dense";
  return SelectorRun{spec, std::move(options)};
}

Status check_same_pages(const SelectorRun& run, const SessionOptions& shared) {
  const SessionOptions& own = run.options;
  if (own.chunk_tokens == shared.chunk_tokens && own.page_tokens == shared.page_tokens &&
      own.kv_dtype == shared.kv_dtype && own.kv_pages == shared.kv_pages) {
    return {};
  }
  return invalid_argument(
      fmt::format("selector '{}': chunk, page, kv-dtype and kv-pages must be the same for all\n"
                  "  try: --chunk, --page, --kv-dtype, --kv-pages themselves",
                  run.label));
}

Result<std::vector<std::string>> SelectorFlags::split() const {
  std::vector<std::string> all;
  std::set<std::string> seen;
  for (const std::string& item : specs) {
    for (std::string& spec : split_selectors(item)) {
      if (!seen.insert(spec).second) {
        return invalid_argument(fmt::format("selector '{}' is named twice\n  allowed: each once", spec));
      }
      all.push_back(std::move(spec));
    }
  }
  if (all.empty()) return invalid_argument("--selector names none\n  allowed: at least one");
  return all;
}

Result<std::vector<SelectorRun>> SelectorFlags::resolve(const GenerateFlags& base, const std::string& model_directory,
                                                        const std::string& final_chunk) const {
  CA_ASSIGN_OR_RETURN(const std::vector<std::string> all, split());
  std::vector<SelectorRun> selectors;
  for (const std::string& spec : all) {
    CA_ASSIGN_OR_RETURN(SelectorRun run, resolve_selector(base, model_directory, spec, final_chunk));
    selectors.push_back(std::move(run));
  }
  return selectors;
}

Result<EvalConfiguration> ruler_configuration(const std::string& model_directory, const LoadedModel& model,
                                              const QuestionFlags& questions, const SourceFiles& sources,
                                              const std::string& final_chunk, const GenerateFlags& generate) {
  CA_ASSIGN_OR_RETURN(const std::string digest, model_digest(model_directory));
  EvalConfiguration configuration;
  configuration.json = {{"benchmark", kRuler},
                        {"form", "RULER form"},  // its wording and parameters; the text is known by its digest
                        {"generator", 1},        // changes when the same seed gives other prompts
                        {"model", digest},
                        {"chat", chat_format_name(model.chat_format)},
                        {"seed", questions.seed},
                        {"final_chunk", final_chunk},
                        {"options", prefill_flag_values(generate)}};
  configuration.json.update(sources.digests());
  return configuration;
}

void add_model_to(CLI::App& command, std::string& directory) {
  command.add_option("-m,--model", directory, "Model directory: config.json, *.safetensors, tokenizer.json")
      ->required();
}

}  // namespace compact::engine
