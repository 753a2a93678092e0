/// `compact run`: one prompt in, its answer and what it cost out.
#include <fmt/format.h>

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "engine/cli/commands.h"
#include "engine/cli/generate_flags.h"
#include "engine/loader/text_file.h"
#include "engine/report/run_report.h"
#include "engine/scheduler/answer.h"

namespace compact::engine {
namespace {

struct RunFlags {
  std::string model_directory;
  std::string prompt_file;
  std::string json_file;
  std::string svg_file;
  GenerateFlags generate;
};

Status write_picture(const RunFlags& flags, const GenerateOptions& options, const Answer& answer) {
  PageMapInput picture = run_page_map(answer, options);
  picture.title =
      fmt::format("KV pages read in prefill: {}, selector {}", flags.model_directory, options.sparsity.selector.name);
  return write_text_file(flags.svg_file, page_map_svg(picture));
}

Status run(const RunFlags& flags) {
  CA_ASSIGN_OR_RETURN(GenerateOptions options, flags.generate.resolve(flags.model_directory));
  options.sparsity.trace_pages = !flags.svg_file.empty();
  for (const std::string& file : {flags.json_file, flags.svg_file}) {
    if (!file.empty()) CA_RETURN_IF_ERROR(check_writable(file));
  }
  CA_ASSIGN_OR_RETURN(const std::string prompt, read_text_file(flags.prompt_file));
  CA_ASSIGN_OR_RETURN(const LoadedModel model, flags.generate.load(flags.model_directory));
  ThreadPool pool(flags.generate.threads);
  const auto print_text = [](std::string_view text) {
    fmt::print("{}", text);
    std::fflush(stdout);
  };
  CA_ASSIGN_OR_RETURN(const Answer answer, answer_prompt(model, prompt, options, print_text, pool));
  fmt::print("\n\n{}", run_table(answer, options));
  if (!flags.json_file.empty())
    CA_RETURN_IF_ERROR(write_text_file(flags.json_file, run_json(answer, options).dump(2) + "\n"));
  if (!flags.svg_file.empty()) CA_RETURN_IF_ERROR(write_picture(flags, options, answer));
  return {};
}

}  // namespace

CommandBody add_run_command(CLI::App& app) {
  const auto flags = std::make_shared<RunFlags>();
  CLI::App* command =
      app.add_subcommand("run", "Answer one prompt; print time to first token, density and union inflation");
  command
      ->add_option("-m,--model", flags->model_directory, "Model directory: config.json, *.safetensors, tokenizer.json")
      ->required();
  command->add_option("-p,--prompt", flags->prompt_file, "File with the prompt; - for standard input")->required();
  flags->generate.add_selector_to(*command);
  flags->generate.add_to(*command);
  command->add_option("--json", flags->json_file, "Write the figures to this file");
  command->add_option("--svg", flags->svg_file, "Draw which pages every KV head read");
  return [flags] { return run(*flags); };
}

}  // namespace compact::engine
