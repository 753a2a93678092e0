/// `compact bench prefill`: time to first token of whole models, selectors beside dense of the same chunk size.
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "engine/bench/prefill.h"
#include "engine/cli/commands.h"
#include "engine/cli/eval_flags.h"
#include "engine/cuda/cuda_model.h"
#include "engine/loader/text_file.h"
#include "engine/report/run_report.h"
#include "engine/scheduler/answer.h"

namespace compact::engine {
namespace {

constexpr std::int32_t kGemmSize = 8192;  // of the product whose rate stands beside

struct BenchPrefillFlags {
  std::string model_directory;
  std::string random_config;
  std::uint64_t weight_seed = 1;
  std::vector<std::int32_t> contexts = {32768};
  SelectorFlags selectors;
  GenerateFlags generate;
  std::string json;
};

Result<std::unique_ptr<Model>> make_random_model(const BenchPrefillFlags& flags, Backend backend,
                                                 std::int32_t longest) {
  if (backend != Backend::kCuda) {
    return unsupported("--random-weights draws them on a GPU\n  allowed: with --backend cuda; or -m DIR");
  }
  std::filesystem::path path = flags.random_config;
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) path /= "config.json";
  CA_ASSIGN_OR_RETURN(const std::string text, read_text_file(path));
  CA_ASSIGN_OR_RETURN(ModelConfig config, parse_model_config(text, path.string()));
  // Speed does not depend on what positions the model was made for.
  config.max_position_embeddings = std::max(config.max_position_embeddings, longest);
  return make_random_cuda_model(config, flags.weight_seed);
}

Result<std::unique_ptr<Model>> make_model(const BenchPrefillFlags& flags, Backend backend, std::int32_t longest) {
  if (flags.model_directory.empty() == flags.random_config.empty()) {
    return invalid_argument("weights come from one place\n  allowed: -m DIR, or --random-weights CONFIG_JSON");
  }
  if (!flags.random_config.empty()) return make_random_model(flags, backend, longest);
  return load_transformer(flags.model_directory, backend);
}

nlohmann::json shape_json(const ModelConfig& config) {
  return {{"architecture", architecture_name(config.architecture)},
          {"layers", config.num_hidden_layers},
          {"hidden", config.hidden_size},
          {"intermediate", config.intermediate_size},
          {"q_heads", config.num_attention_heads},
          {"kv_heads", config.num_key_value_heads},
          {"head_dim", config.head_dim},
          {"vocab", config.vocab_size}};
}

// One row of the table; dense_seconds: of the same chunk size, 0 if not measured before.
nlohmann::json report(const ModelConfig& config, std::int32_t context, const SelectorRun& run,
                      const PrefillTimes& times, double dense_seconds, double gemm_tflops) {
  const PrefillFlop flop = dense_prefill_flop(config, context);
  const bool dense = run.options.sparsity.selector.name == "dense";
  const double tflops = (flop.products + flop.attention) / times.ttft_seconds * 1e-12;
  fmt::print(
      "{:>8} {:>5}  {:<28} {:8.3f} s {:8.0f} tok/s  {:5.2f}x   attention {:8.3f} s ({:4.1f} %), select {:6.3f}   "
      "density {:.3f}  inflation {:.2f}  {:6.1f} GB",
      context, run.options.chunk_tokens, run.label, times.ttft_seconds, context / times.ttft_seconds,
      dense_seconds > 0 ? dense_seconds / times.ttft_seconds : 0.0, times.attention_seconds(),
      100 * times.attention_seconds() / times.ttft_seconds, times.select_seconds, times.stats.density(),
      times.stats.union_inflation(), static_cast<double>(times.peak_bytes) * 1e-9);
  if (dense) {
    fmt::print("  {:.3g} TFLOP/s{}", tflops,
               gemm_tflops > 0 ? fmt::format(" = {:.0f} % of a product", 100 * tflops / gemm_tflops) : "");
  }
  fmt::print("\n");
  std::fflush(stdout);
  nlohmann::json json = {{"context", context},
                         {"chunk", run.options.chunk_tokens},
                         {"selector", run.label},
                         {"ttft_seconds", times.ttft_seconds},
                         {"tokens_per_second", context / times.ttft_seconds},
                         {"attention_seconds", times.attention_seconds()},
                         {"attention_share", times.attention_seconds() / times.ttft_seconds},
                         {"append_seconds", times.append_seconds},
                         {"select_seconds", times.select_seconds},
                         {"unite_seconds", times.unite_seconds},
                         {"attend_seconds", times.attend_seconds},
                         {"density", times.stats.density()},
                         {"union_inflation", times.stats.union_inflation()},
                         {"peak_bytes", times.peak_bytes}};
  if (dense_seconds > 0) json["speedup_to_dense"] = dense_seconds / times.ttft_seconds;
  if (dense) json["tflops"] = tflops;
  return json;
}

Status run_bench_prefill(const BenchPrefillFlags& flags) {
  if (!flags.json.empty()) CA_RETURN_IF_ERROR(check_writable(flags.json));
  CA_ASSIGN_OR_RETURN(const std::vector<SelectorRun> selectors,
                      flags.selectors.resolve(flags.generate, flags.model_directory));
  const Backend backend = selectors.front().options.backend;
  std::vector<std::int32_t> contexts = flags.contexts;
  std::sort(contexts.begin(), contexts.end());
  double gemm_tflops = 0;
  if (backend == Backend::kCuda) {
    CA_ASSIGN_OR_RETURN(gemm_tflops, measure_cuda_gemm_tflops(kGemmSize));
  }
  CA_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, make_model(flags, backend, contexts.back()));
  const ModelConfig& config = model->config();
  ThreadPool pool(flags.generate.threads);
  fmt::print("backend {} ({}), weights {:.2f} GB{}{}\n", backend_name(backend), model->processor(),
             static_cast<double>(model->weight_bytes()) * 1e-9, flags.random_config.empty() ? "" : " (random)",
             gemm_tflops > 0 ? fmt::format(", product of {0} x {0}: {1:.0f} TFLOP/s", kGemmSize, gemm_tflops) : "");
  fmt::print("       L     C  selector                        TTFT\n");
  nlohmann::json figures = {{"backend", backend_name(backend)},
                            {"processor", model->processor()},
                            {"model", flags.random_config.empty() ? flags.model_directory : flags.random_config},
                            {"random_weights", !flags.random_config.empty()},
                            {"shape", shape_json(config)},
                            {"weight_bytes", model->weight_bytes()},
                            {"gemm_tflops", gemm_tflops},
                            {"rows", nlohmann::json::array()}};
  for (const SelectorRun& run : selectors) {  // kernels are loaded and plans are made by the first use
    const std::int32_t few = std::min(contexts.front(), 4 * run.options.chunk_tokens);
    CA_ASSIGN_OR_RETURN([[maybe_unused]] const PrefillTimes warm, bench_prefill(*model, few, run.options, pool));
  }
  for (const std::int32_t context : contexts) {
    std::map<std::int32_t, double> dense_seconds;  // by chunk size
    for (const SelectorRun& run : selectors) {
      const Result<PrefillTimes> times = bench_prefill(*model, context, run.options, pool);
      if (times.status().code() == StatusCode::kOutOfMemory) {  // a figure too: as far as memory goes
        fmt::print("{:>8} {:>5}  {:<28} {}\n", context, run.options.chunk_tokens, run.label, times.status().message());
        figures["rows"].push_back({{"context", context}, {"selector", run.label}, {"error", times.status().message()}});
        continue;
      }
      CA_RETURN_IF_ERROR(times.status());
      double& dense = dense_seconds[run.options.chunk_tokens];
      if (run.options.sparsity.selector.name == "dense") dense = times->ttft_seconds;
      figures["rows"].push_back(report(config, context, run, *times, dense, gemm_tflops));
    }
  }
  return flags.json.empty() ? Status() : write_text_file(flags.json, figures.dump(2) + "\n");
}

}  // namespace

CommandBody add_bench_prefill_command(CLI::App& bench) {
  CLI::App* command = bench.add_subcommand("prefill", "Time to first token of a whole model, beside dense");
  auto flags = std::make_shared<BenchPrefillFlags>();
  flags->selectors.specs = {"dense,mean-key"};
  command->add_option("-m,--model", flags->model_directory, "Model directory: config.json, *.safetensors");
  command->add_option("--random-weights", flags->random_config,
                      "config.json of any supported model; weights are drawn on the GPU: speed without meaning");
  command->add_option("--weight-seed", flags->weight_seed, "Seed of --random-weights")->capture_default_str();
  command->add_option("--context", flags->contexts, "L, tokens of the prompt; several, with commas")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  flags->selectors.add_to(*command);
  flags->generate.add_prefill_to(*command);
  command->add_option("--json", flags->json, "Write the figures to this file");
  return [flags] { return run_bench_prefill(*flags); };
}

}  // namespace compact::engine
