#include "engine/cli/prompt_flags.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <system_error>
#include <utility>

#include "engine/eval/digest.h"
#include "engine/eval/evaluate.h"
#include "engine/loader/text_file.h"

namespace compact::engine {
namespace {

Result<std::vector<std::filesystem::path>> list_files(const std::vector<std::string>& names) {
  std::vector<std::filesystem::path> files;
  for (const std::string& name : names) {
    std::error_code error;
    if (!std::filesystem::is_directory(name, error)) {
      files.emplace_back(name);
      continue;
    }
    std::vector<std::filesystem::path> of_folder;
    for (const auto& entry : std::filesystem::directory_iterator(name, error)) {
      if (entry.is_regular_file()) of_folder.push_back(entry.path());
    }
    if (error) return io_error(fmt::format("cannot list {}: {}", name, error.message()));
    if (of_folder.empty()) return io_error(fmt::format("{} holds no files\n  allowed: a folder of prompts", name));
    std::sort(of_folder.begin(), of_folder.end());
    files.insert(files.end(), of_folder.begin(), of_folder.end());
  }
  return files;
}

}  // namespace

void PromptFlags::add_to(CLI::App& command, const std::string& file_option) {
  CLI::Option* option = command.add_option(file_option, files,
                                           "Text files, each a prompt, or folders of them, in place of RULER's tasks");
  for (CLI::Option* other : questions.add_to(command)) option->excludes(other);
}

Result<Prompts> load_prompts(const PromptFlags& flags, const LoadedModel& model) {
  Prompts result;
  if (!flags.files.empty()) {
    CA_ASSIGN_OR_RETURN(const std::vector<std::filesystem::path> files, list_files(flags.files));
    for (const std::filesystem::path& file : files) {
      CA_ASSIGN_OR_RETURN(const std::string text, read_text_file(file));
      CA_ASSIGN_OR_RETURN(std::vector<std::int32_t> tokens, encode_prompt(model, text));
      result.prompts.push_back({file.string(), std::move(tokens)});
      result.configuration["files"].push_back(hex_digest(fnv1a64(text)));
    }
    return result;
  }
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

}  // namespace compact::engine
