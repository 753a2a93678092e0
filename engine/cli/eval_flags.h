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

/// --selector of a comparison.
struct SelectorFlags {
  std::vector<std::string> specs = {"dense,mean-key"};

  void add_to(CLI::App& command);
  /// Errors: those of parse_selector_spec and of GenerateFlags; kInvalidArgument for none, or one named twice.
  [[nodiscard]] Result<std::vector<SelectorRun>> resolve(const GenerateFlags& base) const;
};

void add_model_to(CLI::App& command, std::string& directory);

}  // namespace compact::engine
