/// `compact demo`: the same long prompt dense and compact, side by side.
#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "engine/cli/commands.h"
#include "engine/cli/demo_prompt.h"
#include "engine/cli/generate_flags.h"
#include "engine/loader/text_file.h"
#include "engine/report/run_report.h"
#include "engine/scheduler/answer.h"

namespace compact::engine {
namespace {

struct DemoFlags {
  std::string model_directory = "assets/demo";
  std::string text_file;  // empty: the checkpoint's own haystack.txt
  std::string question;   // empty: facts are hidden in the text and one is asked for
  std::string expected;
  std::int32_t tokens = 16640;
  std::uint64_t demo_seed = 42;
  std::string json_file;
  std::string svg_file = "demo.svg";
  GenerateFlags generate;
};

std::string text_path(const DemoFlags& flags) {
  return flags.text_file.empty() ? flags.model_directory + "/haystack.txt" : flags.text_file;
}

Result<HaystackPrompt> make_prompt(const DemoFlags& flags, const LoadedModel& model) {
  CA_ASSIGN_OR_RETURN(const std::string text, read_text_file(text_path(flags)));
  if (flags.question.empty()) return make_haystack_prompt(text, flags.tokens, flags.demo_seed, model.tokenizer);
  HaystackPrompt prompt;
  prompt.question = flags.question;
  prompt.expected = flags.expected;
  prompt.text = text + "\n" + flags.question;
  return prompt;
}

std::string trimmed(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  const auto is_space = [](unsigned char c) { return std::isspace(c) != 0; };
  while (!text.empty() && is_space(static_cast<unsigned char>(text.back()))) text.pop_back();
  const auto first = std::find_if_not(text.begin(), text.end(), is_space);
  return {first, text.end()};
}

std::string lowercase(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return text;
}

// RULER's rule: the reference is a substring, case ignored.
std::string marked(const Answer& answer, const std::string& expected) {
  std::string text = trimmed(answer.text);
  if (text.size() > 40) text = text.substr(0, 37) + "...";
  if (expected.empty()) return text;
  const bool right = lowercase(answer.text).find(lowercase(expected)) != std::string::npos;
  return text + (right ? " ✓" : " ✗");
}

// Pads to a width in characters; ✓ and ✗ are three bytes and one column.
std::string column(const std::string& text, std::size_t width) {
  const auto continuation_bytes = std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) == 0x80; });
  const std::size_t columns = text.size() - static_cast<std::size_t>(continuation_bytes);
  return text + std::string(columns < width ? width - columns : 1, ' ');
}

void print_table(const Answer& dense, const Answer& compact, const HaystackPrompt& prompt) {
  const RunTotals dense_totals = sum_layers(dense.result);
  const RunTotals compact_totals = sum_layers(compact.result);
  const auto row = [](const char* name, const std::string& left, const std::string& right, const std::string& note) {
    fmt::print("{:<17}{}{}{}\n", name, column(left, 24), column(right, 24), note);
  };
  const auto ratio = [](double a, double b) { return b > 0 ? fmt::format("{:.1f}x faster", a / b) : std::string(); };
  fmt::print("\n");
  row("", "dense", "compact", "");
  row("answer", marked(dense, prompt.expected), marked(compact, prompt.expected), "");
  row("first token", fmt::format("{:.2f} s", dense.ttft_seconds), fmt::format("{:.2f} s", compact.ttft_seconds),
      ratio(dense.ttft_seconds, compact.ttft_seconds));
  row("attention", fmt::format("{:.2f} s", dense_totals.attention_seconds),
      fmt::format("{:.2f} s", compact_totals.attention_seconds),
      ratio(dense_totals.attention_seconds, compact_totals.attention_seconds));
  row("past pages read", fmt::format("{:.1f} %", 100 * dense_totals.stats.density()),
      fmt::format("{:.1f} %", 100 * compact_totals.stats.density()), "");
  row("union inflation", "-", fmt::format("{:.2f}", compact_totals.stats.union_inflation()), "");
}

// Page of the prompt that holds a byte offset of its text.
Result<std::int32_t> page_of(const LoadedModel& model, const HaystackPrompt& prompt, std::size_t offset,
                             std::int32_t page_tokens) {
  CA_ASSIGN_OR_RETURN(const auto tokens, encode_prompt(model, std::string_view(prompt.text).substr(0, offset)));
  return static_cast<std::int32_t>(tokens.size()) / page_tokens;
}

Status write_picture(const DemoFlags& flags, const GenerateOptions& options, const LoadedModel& model,
                     const HaystackPrompt& prompt, const Answer& compact) {
  PageMapInput picture = run_page_map(compact, options);
  picture.title = "Which KV pages each KV head of each layer read";
  if (!prompt.needle_offsets.empty()) {
    CA_ASSIGN_OR_RETURN(const std::int32_t page,
                        page_of(model, prompt, prompt.needle_offsets.front(), options.page_tokens));
    picture.marks.push_back({page, "page of the fact asked for"});
  }
  return write_text_file(flags.svg_file, page_map_svg(picture));
}

Status demo(const DemoFlags& flags) {
  CA_ASSIGN_OR_RETURN(GenerateOptions compact_options, flags.generate.resolve(flags.model_directory));
  for (const std::string& file : {flags.json_file, flags.svg_file}) {
    if (!file.empty()) CA_RETURN_IF_ERROR(check_writable(file));
  }
  CA_ASSIGN_OR_RETURN(const LoadedModel model, flags.generate.load(flags.model_directory));
  CA_ASSIGN_OR_RETURN(const HaystackPrompt prompt, make_prompt(flags, model));
  ThreadPool pool(flags.generate.threads);
  GenerateOptions dense_options = compact_options;
  dense_options.sparsity.selector.name = "dense";
  compact_options.sparsity.trace_pages = true;

  CA_ASSIGN_OR_RETURN(const auto prompt_tokens, encode_prompt(model, prompt.text));
  fmt::print("{:<17}{}, {} tokens{}\n{:<17}{}\n", "text", text_path(flags), with_thousands(std::ssize(prompt_tokens)),
             prompt.num_needles > 0 ? fmt::format(", {} facts hidden in them", prompt.num_needles) : "", "question",
             prompt.question);
  if (!prompt.expected.empty()) fmt::print("{:<17}{}\n", "expected", prompt.expected);
  CA_ASSIGN_OR_RETURN(const Answer dense, answer_prompt(model, prompt.text, dense_options, {}, pool));
  CA_ASSIGN_OR_RETURN(const Answer compact, answer_prompt(model, prompt.text, compact_options, {}, pool));
  print_table(dense, compact, prompt);
  if (!flags.json_file.empty()) {
    const nlohmann::json json = {{"dense", run_json(dense, dense_options)},
                                 {"compact", run_json(compact, compact_options)},
                                 {"question", prompt.question},
                                 {"expected", prompt.expected}};
    CA_RETURN_IF_ERROR(write_text_file(flags.json_file, json.dump(2) + "\n"));
  }
  if (!flags.svg_file.empty()) {
    CA_RETURN_IF_ERROR(write_picture(flags, compact_options, model, prompt, compact));
    fmt::print("{:<17}{}\n", "picture", flags.svg_file);
  }
  return {};
}

}  // namespace

CommandBody add_demo_command(CLI::App& app) {
  const auto flags = std::make_shared<DemoFlags>();
  flags->generate.options.max_tokens = 32;
  CLI::App* command = app.add_subcommand("demo", "Prefill one long prompt dense and compact, and compare");
  command->add_option("-m,--model", flags->model_directory, "Model directory")->capture_default_str();
  command->add_option("--text", flags->text_file, "Your own text instead of the checkpoint's haystack.txt");
  command->add_option("--question", flags->question,
                      "Your own question about it; otherwise facts are hidden in the text");
  command->add_option("--expect", flags->expected, "What a right answer to your question contains");
  command->add_option("--tokens", flags->tokens, "Length of the prompt when facts are hidden")->capture_default_str();
  command->add_option("--demo-seed", flags->demo_seed, "Seed of the hidden facts")->capture_default_str();
  command->add_option("--json", flags->json_file, "Write the figures of both runs to this file");
  command->add_option("--svg", flags->svg_file, "Where to draw which pages were read; empty: nowhere")
      ->capture_default_str();
  flags->generate.add_selector_to(*command);
  flags->generate.add_to(*command);
  return [flags] { return demo(*flags); };
}

}  // namespace compact::engine
