/// Flags that the subcommands of `compact eval` share.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "compact/status.h"
#include "engine/cli/generate_flags.h"
#include "engine/eval/evaluate.h"

namespace compact::engine {

/// Where the figures go besides standard output.
struct ReportFiles {
  std::string json;
  std::string markdown;

  void add_to(CLI::App& command);
  /// Errors: kIoError for a file that could not be written later.
  [[nodiscard]] Status check() const;
  /// Prints the table and writes the files asked for.
  [[nodiscard]] Status write(const std::string& table, const nlohmann::json& figures) const;
};

/// The file that every finding is written to as it comes.
struct WorkFlags {
  std::string file;
  bool resume = false;

  /// Returns --work, for what excludes it.
  CLI::Option* add_to(CLI::App& command);
  /// Leaves `work` empty without --work. Errors: those of WorkFile::open.
  [[nodiscard]] Status open(const EvalConfiguration& configuration, std::optional<WorkFile>& work) const;
};

/// --shard I/N. Errors: kInvalidArgument for anything else.
void add_shard_to(CLI::App& command, std::string& text);
[[nodiscard]] Result<Shard> parse_shard(const std::string& text);

/// Names from lists separated by commas; "all" and "generated" stand for theirs.
[[nodiscard]] std::vector<std::string> split_tasks(const std::vector<std::string>& items);

/// Which of RULER's samples.
struct QuestionFlags {
  std::vector<std::string> tasks = {"generated"};
  std::vector<std::int32_t> lengths = {8192, 16384};
  std::int32_t samples = 100;
  std::uint64_t seed = 42;
  std::string essays;
  std::vector<std::string> words;
  std::string qa_1;
  std::string qa_2;

  /// Returns the options, for what excludes them.
  std::vector<CLI::Option*> add_to(CLI::App& command);
  /// Without a shard.
  [[nodiscard]] RulerQuestions resolve() const;
};

/// What prompts are made of. A default file that is not there is missed only by a task that needs it.
class SourceFiles {
 public:
  /// Errors: those of Prose, WordList and QuestionSet.
  [[nodiscard]] static Result<SourceFiles> load(const QuestionFlags& flags);

  [[nodiscard]] RulerSources view() const;
  /// Digests by name; what is not there is "none".
  [[nodiscard]] nlohmann::json digests() const;

 private:
  std::optional<Prose> prose_;
  std::optional<WordList> words_;
  std::optional<QuestionSet> qa_1_;
  std::optional<QuestionSet> qa_2_;
};

/// --final-chunk: the prompt's last chunk, which holds the question.
void add_final_chunk_to(CLI::App& command, std::string& text);

/// What a spec stands for. Errors: those of parse_selector_spec and of GenerateFlags; kInvalidArgument for another
/// final chunk than "sparse" and "dense".
[[nodiscard]] Result<SelectorRun> resolve_selector(const GenerateFlags& base, const std::string& model_directory,
                                                   const std::string& spec, const std::string& final_chunk);

/// What a selector may not set for itself where all are to see the same pages. Errors: kInvalidArgument.
[[nodiscard]] Status check_same_pages(const SelectorRun& run, const SessionOptions& shared);

/// --selector of a comparison.
struct SelectorFlags {
  std::vector<std::string> specs = {"dense,mean-key"};

  void add_to(CLI::App& command);
  /// The specs one by one. Errors: kInvalidArgument for none, or one named twice.
  [[nodiscard]] Result<std::vector<std::string>> split() const;
  /// Errors: those of split and of resolve_selector.
  [[nodiscard]] Result<std::vector<SelectorRun>> resolve(const GenerateFlags& base, const std::string& model_directory,
                                                         const std::string& final_chunk = "sparse") const;
};

/// What makes answers to RULER's questions comparable. Errors: those of model_digest.
[[nodiscard]] Result<EvalConfiguration> ruler_configuration(const std::string& model_directory,
                                                            const LoadedModel& model, const QuestionFlags& questions,
                                                            const SourceFiles& sources, const std::string& final_chunk,
                                                            const GenerateFlags& generate);

void add_model_to(CLI::App& command, std::string& directory);

}  // namespace compact::engine
