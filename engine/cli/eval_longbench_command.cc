/// `compact eval longbench`: LongBench v2 from the user's copy of its file.
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "engine/cli/ask_with_progress.h"
#include "engine/cli/commands.h"
#include "engine/cli/eval_flags.h"
#include "engine/cli/eval_outputs.h"
#include "engine/cli/selector_spec.h"
#include "engine/eval/digest.h"
#include "engine/eval/longbench.h"

namespace compact::engine {
namespace {

constexpr std::int32_t kMostTokens = 131072;  // of a prompt, as the benchmark is usually run

struct LongBenchFlags {
  std::string model_directory;
  std::string data_file;
  std::int32_t samples = 0;      // 0: all
  std::int32_t most_tokens = 0;  // 0: as many as the model allows, at most kMostTokens
  SelectorFlags selectors;
  std::string final_chunk = "sparse";
  std::string shard = "0/1";
  WorkFlags work;
  ReportFiles report;
  GenerateFlags generate;
};

Result<std::int32_t> most_prompt_tokens(const LongBenchFlags& flags, const ModelConfig& config) {
  const std::int32_t room = config.max_position_embeddings - kLongBenchAnswerTokens;
  if (flags.most_tokens == 0 && room >= 1) return std::min(room, kMostTokens);
  if (flags.most_tokens >= 1 && flags.most_tokens <= room) return flags.most_tokens;
  return invalid_argument(
      fmt::format("--max-prompt is {} tokens\n  allowed: 1 to {}, the model's {} positions less {} "
                  "for the answer",
                  flags.most_tokens, room, config.max_position_embeddings, kLongBenchAnswerTokens));
}

Status eval_longbench(const LongBenchFlags& flags) {
  CA_ASSIGN_OR_RETURN(const std::vector<SelectorRun> selectors,
                      flags.selectors.resolve(flags.generate, flags.model_directory, flags.final_chunk));
  CA_ASSIGN_OR_RETURN(const Shard shard, parse_shard(flags.shard));
  CA_RETURN_IF_ERROR(flags.report.check());
  CA_ASSIGN_OR_RETURN(const LongBench bench, LongBench::load(flags.data_file));
  const auto num_items = static_cast<std::int32_t>(bench.items().size());
  if (flags.samples < 0 || flags.samples > num_items) {
    return invalid_argument(fmt::format("--samples is {}\n  allowed: 0 for all, or 1 to the file's {} questions",
                                        flags.samples, num_items));
  }
  CA_ASSIGN_OR_RETURN(const LoadedModel model, flags.generate.load(flags.model_directory));
  CA_ASSIGN_OR_RETURN(const std::int32_t most_tokens, most_prompt_tokens(flags, model.transformer->config()));
  EvalConfiguration configuration;
  CA_ASSIGN_OR_RETURN(const std::string digest, model_digest(flags.model_directory));
  configuration.json = {{"benchmark", kLongBench},
                        {"form", "LongBench v2, prompt in words of our own"},
                        {"generator", 1},  // changes with the wording
                        {"model", digest},
                        {"data", bench.digest()},
                        {"chat", chat_format_name(model.chat_format)},
                        {"final_chunk", flags.final_chunk},
                        {"options", prefill_flag_values(flags.generate)}};
  std::optional<WorkFile> work;
  CA_RETURN_IF_ERROR(flags.work.open(configuration, work));
  ThreadPool pool(flags.generate.threads);
  CA_ASSIGN_OR_RETURN(Answerer answerer, Answerer::create(model, work ? &*work : nullptr, pool));

  const std::int32_t end = flags.samples == 0 ? num_items : flags.samples;
  AskProgress progress("compact eval longbench");
  for (std::int32_t i = shard.index; i < end; i += shard.count) {
    progress.add(longbench_name(bench.items()[static_cast<std::size_t>(i)], most_tokens, i), selectors, answerer);
  }
  progress.watch(answerer);
  for (std::int32_t i = shard.index; i < end; i += shard.count) {
    const LongBenchItem& item = bench.items()[static_cast<std::size_t>(i)];
    CA_RETURN_IF_ERROR(answerer.ask(longbench_name(item, most_tokens, i), selectors,
                                    [&] { return longbench_question(model, item, most_tokens); }));
  }
  return write_longbench(flags.report, configuration, answerer.records());
}

}  // namespace

CommandBody add_eval_longbench_command(CLI::App& eval) {
  const auto flags = std::make_shared<LongBenchFlags>();
  CLI::App* command =
      eval.add_subcommand("longbench", "LongBench v2 (arXiv 2412.15204) from your copy of its data.json");
  add_model_to(*command, flags->model_directory);
  command->add_option("--data", flags->data_file, "data.json of LongBench v2")->required();
  command->add_option("--samples", flags->samples, "The first questions of the file; 0: all")->capture_default_str();
  command
      ->add_option("--max-prompt", flags->most_tokens,
                   "Tokens of a prompt at most, of a longer one the middle is left out; 0: what the model allows, at "
                   "most 131072")
      ->capture_default_str();
  flags->selectors.add_to(*command);
  add_final_chunk_to(*command, flags->final_chunk);
  flags->work.add_to(*command);
  add_shard_to(*command, flags->shard);
  flags->report.add_to(*command);
  flags->generate.add_prefill_to(*command);
  return [flags] { return eval_longbench(*flags); };
}

}  // namespace compact::engine
