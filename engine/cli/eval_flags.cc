#include "engine/cli/eval_flags.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "engine/cli/files.h"
#include "engine/cli/selector_spec.h"

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

RulerQuestions QuestionFlags::resolve() const {
  RulerQuestions questions;
  for (const std::string& item : tasks) {
    for (const std::string& task : split_list(item)) {
      std::vector<std::string> names = {task};
      if (task == "all") names = ruler_task_names();
      if (task == "generated") names = generated_ruler_task_names();
      questions.tasks.insert(questions.tasks.end(), names.begin(), names.end());
    }
  }
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

Result<std::vector<SelectorRun>> SelectorFlags::resolve(const GenerateFlags& base) const {
  std::vector<SelectorRun> selectors;
  std::set<std::string> labels;
  for (const std::string& item : specs) {
    for (const std::string& spec : split_selectors(item)) {
      if (!labels.insert(spec).second) {
        return invalid_argument(fmt::format("selector '{}' is named twice\n  allowed: each once", spec));
      }
      CA_ASSIGN_OR_RETURN(const GenerateFlags generate, parse_selector_spec(base, spec));
      CA_ASSIGN_OR_RETURN(GenerateOptions options, generate.resolve());
      selectors.push_back({spec, std::move(options)});
    }
  }
  if (selectors.empty()) return invalid_argument("--selector names none\n  allowed: at least one");
  return selectors;
}

void add_model_to(CLI::App& command, std::string& directory) {
  command.add_option("-m,--model", directory, "Model directory: config.json, *.safetensors, tokenizer.json")
      ->required();
}

}  // namespace compact::engine
