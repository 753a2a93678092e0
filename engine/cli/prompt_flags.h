/// Prompts that need no right answers: the user's files, or RULER's samples.
#pragma once

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "compact/status.h"
#include "engine/cli/eval_flags.h"
#include "engine/eval/recall.h"
#include "engine/scheduler/answer.h"

namespace compact::engine {

struct PromptFlags {
  std::vector<std::string> files;  // or folders of files; empty: RULER's samples
  QuestionFlags questions;

  /// file_option: e.g. "-p,--prompt".
  void add_to(CLI::App& command, const std::string& file_option);
};

struct Prompts {
  std::vector<RecallPrompt> prompts;  // each file a group, or each task and length
  nlohmann::json configuration;       // what they were made of
};

/// Files as they are, in the model's chat format; of a folder its files by name.
/// Errors: kIoError for a file or folder that cannot be read, or a folder without files; those of RULER's tasks.
[[nodiscard]] Result<Prompts> load_prompts(const PromptFlags& flags, const LoadedModel& model);

}  // namespace compact::engine
