/// `compact bench step`: select + unite + attend of one layer and chunk beside dense attention.
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/bench/measure.h"
#include "engine/bench/step_cpu.h"
#include "engine/cli/commands.h"
#include "engine/cli/files.h"

namespace compact::engine {
namespace {

struct BenchStepFlags {
  std::string backend = "cpu";
  std::vector<std::int32_t> contexts = {32768};
  double density = 0.10;
  std::string dtype = "f32";
  StepShape shape;
  std::int32_t threads = 0;
  std::int32_t repeats = 5;
  bool cpu_time = false;
  std::string json;
};

nlohmann::json report(const StepRow& row, double dense_seconds) {
  const StepTimes& times = row.times;
  fmt::print(
      "  {:<15} select {:7.2f} ms  unite {:6.3f} ms  attend {:8.2f} ms  {:5.2f}x   density {:.3f}  inflation {:.2f}  "
      "{}\n",
      row.name, 1e3 * times.select, 1e3 * times.unite, 1e3 * times.attend, dense_seconds / times.total(),
      times.stats.density(), times.stats.union_inflation(),
      times.reason == DenseReason::kNone ? "" : dense_reason_name(times.reason));
  return {{"name", row.name},
          {"share", row.share},
          {"select_seconds", times.select},
          {"unite_seconds", times.unite},
          {"attend_seconds", times.attend},
          {"speedup", dense_seconds / times.total()},
          {"density", times.stats.density()},
          {"union_inflation", times.stats.union_inflation()},
          {"dense_reason", dense_reason_name(times.reason)}};
}

Status run_bench_step(BenchStepFlags flags) {
  if (flags.backend != "cpu") {
    return invalid_argument(fmt::format("--backend is '{}'; this build times: cpu", flags.backend));
  }
  if (!flags.json.empty()) CA_RETURN_IF_ERROR(check_writable(flags.json));
  if (!bench::use_cpu_time(flags.cpu_time, flags.threads)) return invalid_argument("--cpu-time with several threads");
  flags.shape.dtype = flags.dtype == "f32" ? DType::kF32 : DType::kBF16;
  std::sort(flags.contexts.begin(), flags.contexts.end());

  ThreadPool pool(flags.threads);
  const CpuKernel kernel = best_cpu_kernel(flags.shape.dtype);
  fmt::print("{} time   threads {}   kernel {} ({})   D={} Hq={} Hkv={} C={} P={} {}\n", bench::clock_name(),
             pool.num_threads(), cpu_kernel_name(kernel), cpu_attention_target(), flags.shape.head_dim,
             flags.shape.num_q_heads, flags.shape.num_kv_heads, flags.shape.chunk, flags.shape.page_tokens,
             flags.dtype);
  nlohmann::json figures = {{"backend", "cpu"},
                            {"kernel", cpu_kernel_name(kernel)},
                            {"target", cpu_attention_target()},
                            {"clock", bench::clock_name()},
                            {"threads", pool.num_threads()},
                            {"repeats", flags.repeats},
                            {"num_q_heads", flags.shape.num_q_heads},
                            {"num_kv_heads", flags.shape.num_kv_heads},
                            {"head_dim", flags.shape.head_dim},
                            {"chunk", flags.shape.chunk},
                            {"page_tokens", flags.shape.page_tokens},
                            {"dtype", flags.dtype},
                            {"selector", "mean-key"},
                            {"wanted_density", flags.density}};
  std::int32_t pays_from = 0;  // least context from which on the default policy gains
  for (const std::int32_t context : flags.contexts) {
    CA_ASSIGN_OR_RETURN(const std::vector<StepRow> rows,
                        bench_step_cpu(flags.shape, context, flags.density, flags.repeats, pool));
    const double dense_seconds = rows.front().times.total();
    fmt::print("L={}\n", context);
    nlohmann::json modes = nlohmann::json::array();
    for (const StepRow& row : rows) {
      modes.push_back(report(row, dense_seconds));
      if (row.name == union_mode_name(UnionMode::kAdaptive)) {  // the figures of the largest context stay
        figures["mode"] = row.name;
        figures["context"] = context;
        figures["dense_seconds"] = dense_seconds;
        figures["step_seconds"] = row.times.total();
        figures["select_seconds"] = row.times.select;
        figures["unite_seconds"] = row.times.unite;
        figures["attention_seconds"] = row.times.attend;
        figures["density"] = row.times.stats.density();
        figures["union_inflation"] = row.times.stats.union_inflation();
      }
    }
    if (rows.back().times.total() * 1.05 > dense_seconds) {  // a gain below 5 % is noise
      pays_from = 0;
    } else if (pays_from == 0) {
      pays_from = context;
    }
    figures["contexts"].push_back({{"context", context}, {"modes", modes}});
  }
  fmt::print("of these contexts the default policy gains from L={} on\n", pays_from);
  figures["pays_from_tokens"] = pays_from;
  return flags.json.empty() ? Status() : write_text_file(flags.json, figures.dump(2) + "\n");
}

}  // namespace

CommandBody add_bench_step_command(CLI::App& bench) {
  CLI::App* command = bench.add_subcommand("step", "One layer and chunk: select, unite, attend");
  auto flags = std::make_shared<BenchStepFlags>();
  command->add_option("--backend", flags->backend, "Where to compute: cpu")->capture_default_str();
  command->add_option("--context", flags->contexts, "L, tokens of the request with its chunk; several, with commas")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--density", flags->density, "Past pages that mode adaptive reads, of those there")
      ->check(CLI::Range(0.001, 1.0))
      ->capture_default_str();
  command->add_option("--q-heads", flags->shape.num_q_heads, "Hq")->capture_default_str();
  command->add_option("--kv-heads", flags->shape.num_kv_heads, "Hkv")->capture_default_str();
  command->add_option("--head-dim", flags->shape.head_dim, "D")->capture_default_str();
  command->add_option("--chunk", flags->shape.chunk, "C, query tokens")->capture_default_str();
  command->add_option("--page", flags->shape.page_tokens, "P, tokens of a KV page")->capture_default_str();
  command->add_option("--kv-dtype", flags->dtype, "Storage of K and V")
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->capture_default_str();
  command->add_option("--threads", flags->threads, "CPU threads; 0: all this process may use")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  command->add_option("--repeats", flags->repeats, "Timed runs, of which the median counts")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_flag("--cpu-time", flags->cpu_time, "CPU seconds, for one thread on a busy machine");
  command->add_option("--json", flags->json, "Write the figures to this file");
  return [flags] { return run_bench_step(*flags); };
}

}  // namespace compact::engine
