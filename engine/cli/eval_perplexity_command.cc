/// `compact eval perplexity`: what a selector costs in likelihood, by position, on a text of the user's.
#include <fmt/format.h>

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "engine/cli/commands.h"
#include "engine/cli/eval_flags.h"
#include "engine/cli/eval_outputs.h"
#include "engine/cli/selector_spec.h"
#include "engine/eval/digest.h"
#include "engine/eval/perplexity.h"
#include "engine/loader/text_file.h"
#include "engine/report/progress.h"

namespace compact::engine {
namespace {

struct PerplexityFlags {
  std::string model_directory;
  std::string text_file;
  std::vector<std::int32_t> lengths = {8192};
  std::int32_t samples = 2;
  std::int32_t first_bucket_tokens = 1024;
  SelectorFlags selectors;
  std::string final_chunk = "sparse";
  std::string shard = "0/1";
  WorkFlags work;
  ReportFiles report;
  GenerateFlags generate;
};

Status eval_perplexity(const PerplexityFlags& flags) {
  CA_ASSIGN_OR_RETURN(const std::vector<SelectorRun> selectors,
                      flags.selectors.resolve(flags.generate, flags.model_directory, flags.final_chunk));
  CA_ASSIGN_OR_RETURN(const Shard shard, parse_shard(flags.shard));
  if (flags.first_bucket_tokens < 1) {
    return invalid_argument(fmt::format("--bucket is {}\n  allowed: 1 token or more", flags.first_bucket_tokens));
  }
  CA_RETURN_IF_ERROR(flags.report.check());
  CA_ASSIGN_OR_RETURN(const std::string text, read_text_file(flags.text_file));
  CA_ASSIGN_OR_RETURN(const LoadedModel model, flags.generate.load(flags.model_directory));
  std::vector<std::vector<std::vector<std::int32_t>>> windows;  // [length][window][token]
  for (const std::int32_t length : flags.lengths) {
    CA_ASSIGN_OR_RETURN(std::vector<std::vector<std::int32_t>> of_length,
                        text_windows(model.tokenizer, text, length, flags.samples));
    windows.push_back(std::move(of_length));
  }
  EvalConfiguration configuration;
  CA_ASSIGN_OR_RETURN(const std::string digest, model_digest(flags.model_directory));
  configuration.json = {{"benchmark", kPerplexity},          {"model", digest},
                        {"text", hex_digest(fnv1a64(text))}, {"first_bucket_tokens", flags.first_bucket_tokens},
                        {"final_chunk", flags.final_chunk},  {"options", prefill_flag_values(flags.generate)}};
  std::optional<WorkFile> work;
  CA_RETURN_IF_ERROR(flags.work.open(configuration, work));
  std::vector<PerplexityRecord> records;
  if (work) {
    CA_ASSIGN_OR_RETURN(records, windows_of(work->resumed()));
  }
  const auto cost = [](std::int32_t tokens) { return static_cast<double>(tokens) * (tokens + 4096.0); };
  double total_cost = 0;
  for (const std::int32_t length : flags.lengths) {
    total_cost += cost(length) * flags.samples * static_cast<double>(selectors.size()) / shard.count;
  }
  ProgressBar bar("perplexity", total_cost);
  const auto on_window = [&](const PerplexityRecord& record) {
    bar.advance(cost(record.length_tokens),
                fmt::format("{} #{} {}", record.length_tokens, record.window, record.selector));
  };
  ThreadPool pool(flags.generate.threads);
  for (const auto& of_length : windows) {
    CA_RETURN_IF_ERROR(measure_perplexity({model, of_length, shard, flags.first_bucket_tokens}, selectors,
                                          work ? &*work : nullptr, records, on_window, pool));
  }
  return write_perplexity(flags.report, configuration, records);
}

}  // namespace

CommandBody add_eval_perplexity_command(CLI::App& eval) {
  const auto flags = std::make_shared<PerplexityFlags>();
  CLI::App* command = eval.add_subcommand("perplexity", "Perplexity of a text by position, dense and with selectors");
  add_model_to(*command, flags->model_directory);
  command->add_option("--text", flags->text_file, "Text file, read in windows from its beginning")->required();
  command->add_option("--lengths", flags->lengths, "Tokens of a window")->capture_default_str();
  command->add_option("--samples", flags->samples, "Windows of each length")->capture_default_str();
  command
      ->add_option("--bucket", flags->first_bucket_tokens,
                   "Positions of the first range of the table; each of the next is twice as far")
      ->capture_default_str();
  flags->selectors.add_to(*command);
  add_final_chunk_to(*command, flags->final_chunk);
  flags->work.add_to(*command);
  add_shard_to(*command, flags->shard);
  flags->report.add_to(*command);
  flags->generate.add_prefill_to(*command);
  return [flags] { return eval_perplexity(*flags); };
}

}  // namespace compact::engine
