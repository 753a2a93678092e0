/// `compact bench step`: select + unite + attend of one layer and chunk beside dense attention; `compact bench select`:
/// selection and union alone.
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "engine/bench/measure.h"
#include "engine/bench/step_cpu.h"
#include "engine/bench/step_cuda.h"
#include "engine/cli/commands.h"
#include "engine/loader/text_file.h"
#include "engine/report/step_svg.h"

namespace compact::engine {
namespace {

struct BenchStepFlags {
  std::string backend = "cpu";
  std::vector<std::int32_t> contexts = {32768};
  std::vector<double> densities = {0.10};
  std::string dtype;  // empty: f32 on the CPU, bf16 on a GPU
  StepShape shape;
  std::int32_t requests = 1;
  std::int32_t threads = 0;
  std::int32_t repeats = 5;
  bool cpu_time = false;
  std::string json;
  std::string svg;
};

nlohmann::json report(const StepRow& row, double dense_seconds) {
  const StepTimes& times = row.times;
  fmt::print(
      "  {:<15} select {:8.4f} ms  unite {:7.4f} ms  attend {:9.4f} ms  whole {:9.4f} ms  {:5.2f}x   density {:.3f}  "
      "inflation {:.2f}  {}\n",
      row.name, 1e3 * times.select, 1e3 * times.unite, 1e3 * times.attend, 1e3 * times.total(),
      dense_seconds / times.total(), times.stats.density(), times.stats.union_inflation(),
      times.reason == DenseReason::kNone ? "" : dense_reason_name(times.reason));
  nlohmann::json figures = {{"name", row.name},
                            {"share", row.share},
                            {"select_seconds", times.select},
                            {"unite_seconds", times.unite},
                            {"attend_seconds", times.attend},
                            {"step_seconds", times.total()},
                            {"speedup", dense_seconds / times.total()},
                            {"density", times.stats.density()},
                            {"union_inflation", times.stats.union_inflation()},
                            {"dense_reason", dense_reason_name(times.reason)}};
  if (times.plan > 0) figures["plan_seconds"] = times.plan;
  return figures;
}

// Times one context and density; what computes, for the heading and the file.
struct Backend {
  std::function<Result<std::vector<StepRow>>(std::int32_t context, double density)> run;
  nlohmann::json about;
};

Backend cpu_backend(const BenchStepFlags& flags, ThreadPool& pool) {
  const CpuKernel kernel = best_cpu_kernel(flags.shape.dtype);
  fmt::print("{} time   threads {}   kernel {} ({})   ", bench::clock_name(), pool.num_threads(),
             cpu_kernel_name(kernel), cpu_attention_target());
  return {[&flags, &pool](std::int32_t context, double density) {
            return bench_step_cpu(flags.shape, context, density, flags.repeats, pool);
          },
          {{"kernel", cpu_kernel_name(kernel)},
           {"target", cpu_attention_target()},
           {"clock", bench::clock_name()},
           {"threads", pool.num_threads()},
           {"repeats", flags.repeats}}};
}

Result<Backend> cuda_backend(const BenchStepFlags& flags) {
  CA_ASSIGN_OR_RETURN(const CudaBenchDevice device, cuda_bench_device());
  fmt::print("{}   kernel {}   B={} ", device.name, device.kernel, flags.requests);
  return Backend{[&flags](std::int32_t context, double density) {
                   return bench_step_cuda(flags.shape, flags.requests, context, density, true);
                 },
                 {{"kernel", device.kernel}, {"target", device.name}, {"clock", "cuda events"}}};
}

Status check_flags(BenchStepFlags& flags) {
  if (flags.backend != "cpu" && flags.backend != "cuda") {
    return invalid_argument(fmt::format("--backend is '{}'; allowed: cpu, cuda", flags.backend));
  }
  const bool cuda = flags.backend == "cuda";
  if (flags.dtype.empty()) flags.dtype = cuda ? "bf16" : "f32";
  if (cuda && flags.dtype != "bf16") return unsupported("--kv-dtype f32 with --backend cuda; bf16");
  if (cuda && flags.cpu_time) return invalid_argument("--cpu-time with --backend cuda, which is timed by CUDA events");
  if (!cuda && flags.requests != 1) {
    return unsupported(fmt::format("--requests is {} with --backend cpu; 1", flags.requests));
  }
  for (const std::string& file : {flags.json, flags.svg}) {
    if (!file.empty()) CA_RETURN_IF_ERROR(check_writable(file));
  }
  if (!bench::use_cpu_time(flags.cpu_time, flags.threads)) return invalid_argument("--cpu-time with several threads");
  flags.shape.dtype = flags.dtype == "f32" ? DType::kF32 : DType::kBF16;
  std::sort(flags.contexts.begin(), flags.contexts.end());
  return {};
}

nlohmann::json shape_figures(const BenchStepFlags& flags) {
  return {{"backend", flags.backend},
          {"requests", flags.requests},
          {"num_q_heads", flags.shape.num_q_heads},
          {"num_kv_heads", flags.shape.num_kv_heads},
          {"head_dim", flags.shape.head_dim},
          {"chunk", flags.shape.chunk},
          {"page_tokens", flags.shape.page_tokens},
          {"dtype", flags.dtype},
          {"selector", "mean-key"}};
}

std::string shape_text(const BenchStepFlags& flags) {
  return fmt::format("D={} Hq={} Hkv={} C={} P={} {}", flags.shape.head_dim, flags.shape.num_q_heads,
                     flags.shape.num_kv_heads, flags.shape.chunk, flags.shape.page_tokens, flags.dtype);
}

Status run_bench_step(BenchStepFlags flags) {
  CA_RETURN_IF_ERROR(check_flags(flags));
  std::optional<ThreadPool> pool;
  Backend backend;
  if (flags.backend == "cpu") {
    backend = cpu_backend(flags, pool.emplace(flags.threads));
  } else {
    CA_ASSIGN_OR_RETURN(backend, cuda_backend(flags));
  }
  fmt::print("{}\n", shape_text(flags));
  nlohmann::json figures = shape_figures(flags);
  figures.update(backend.about);
  if (flags.densities.size() == 1) figures["wanted_density"] = flags.densities.front();
  std::vector<StepPoint> points;
  std::int32_t pays_from = 0;  // least context from which on the default policy gains
  for (const std::int32_t context : flags.contexts) {
    bool gains = true;
    for (const double density : flags.densities) {
      CA_ASSIGN_OR_RETURN(const std::vector<StepRow> rows, backend.run(context, density));
      points.push_back({context, density, rows});
      const double dense_seconds = rows.front().times.total();
      fmt::print("L={} density {}\n", context, density);
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
      gains = gains && rows.back().times.total() * 1.05 <= dense_seconds;  // a gain below 5 % is noise
      figures["contexts"].push_back({{"context", context}, {"wanted_density", density}, {"modes", modes}});
    }
    if (!gains) {
      pays_from = 0;
    } else if (pays_from == 0) {
      pays_from = context;
    }
  }
  fmt::print("of these contexts the default policy gains from L={} on\n", pays_from);
  figures["pays_from_tokens"] = pays_from;
  if (!flags.svg.empty()) {
    const std::string title = fmt::format("One step, B={} {}", flags.requests, shape_text(flags));
    CA_RETURN_IF_ERROR(write_text_file(flags.svg, step_svg(title, points)));
  }
  return flags.json.empty() ? Status() : write_text_file(flags.json, figures.dump(2) + "\n");
}

Status run_bench_select(BenchStepFlags flags) {
  CA_RETURN_IF_ERROR(check_flags(flags));
  if (flags.backend != "cuda") return unsupported("bench select times: cuda; for the CPU see bench step");
  CA_ASSIGN_OR_RETURN(const CudaBenchDevice device, cuda_bench_device());
  fmt::print("{}   kernel {}   B={} ", device.name, device.kernel, flags.requests);
  fmt::print("{}\n", shape_text(flags));
  nlohmann::json figures = shape_figures(flags);
  figures["kernel"] = device.kernel;
  figures["target"] = device.name;
  for (const std::int32_t context : flags.contexts) {
    for (const double density : flags.densities) {
      CA_ASSIGN_OR_RETURN(const std::vector<StepRow> rows,
                          bench_step_cuda(flags.shape, flags.requests, context, density, false));
      fmt::print("L={} density {}\n", context, density);
      nlohmann::json modes = nlohmann::json::array();
      for (const StepRow& row : rows) {
        const StepTimes& times = row.times;
        fmt::print("  {:<9} plan {:7.4f} ms  select {:7.4f} ms  unite {:7.4f} ms   density {:.3f}  inflation {:.2f}\n",
                   row.name, 1e3 * times.plan, 1e3 * times.select, 1e3 * times.unite, times.stats.density(),
                   times.stats.union_inflation());
        modes.push_back({{"name", row.name},
                         {"share", row.share},
                         {"plan_seconds", times.plan},
                         {"select_seconds", times.select},
                         {"unite_seconds", times.unite},
                         {"density", times.stats.density()},
                         {"union_inflation", times.stats.union_inflation()}});
      }
      figures["contexts"].push_back({{"context", context}, {"wanted_density", density}, {"modes", modes}});
    }
  }
  return flags.json.empty() ? Status() : write_text_file(flags.json, figures.dump(2) + "\n");
}

// What both commands ask for.
void add_shape_flags(CLI::App& command, BenchStepFlags& flags) {
  command.add_option("--backend", flags.backend, "Where to compute: cpu, cuda")->capture_default_str();
  command.add_option("--context", flags.contexts, "L, tokens of a request with its chunk; several, with commas")
      ->delimiter(',')
      ->capture_default_str();
  command
      .add_option("--density", flags.densities,
                  "Past pages read, of those there: by mode adaptive on the CPU, by mode paper on a GPU; several, with "
                  "commas")
      ->delimiter(',')
      ->check(CLI::Range(0.001, 1.0))
      ->capture_default_str();
  command.add_option("--requests", flags.requests, "B, requests of the step (cuda)")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command.add_option("--q-heads", flags.shape.num_q_heads, "Hq")->capture_default_str();
  command.add_option("--kv-heads", flags.shape.num_kv_heads, "Hkv")->capture_default_str();
  command.add_option("--head-dim", flags.shape.head_dim, "D")->capture_default_str();
  command.add_option("--chunk", flags.shape.chunk, "C, query tokens")->capture_default_str();
  command.add_option("--page", flags.shape.page_tokens, "P, tokens of a KV page")->capture_default_str();
  command.add_option("--json", flags.json, "Write the figures to this file");
}

}  // namespace

CommandBody add_bench_step_command(CLI::App& bench) {
  CLI::App* command = bench.add_subcommand("step", "One layer and chunk: select, unite, attend");
  auto flags = std::make_shared<BenchStepFlags>();
  add_shape_flags(*command, *flags);
  command->add_option("--kv-dtype", flags->dtype, "Storage of K and V; f32 on the CPU and bf16 on a GPU if not given")
      ->check(CLI::IsMember({"f32", "bf16"}));
  command->add_option("--threads", flags->threads, "CPU threads; 0: all this process may use")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  command->add_option("--repeats", flags->repeats, "Timed runs on the CPU, of which the median counts")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_option("--svg", flags->svg, "Draw time against density and speed-up against the context into this file");
  command->add_flag("--cpu-time", flags->cpu_time, "CPU seconds, for one thread on a busy machine");
  return [flags] { return run_bench_step(*flags); };
}

CommandBody add_bench_select_command(CLI::App& bench) {
  CLI::App* command = bench.add_subcommand("select", "One layer and chunk: selection and union alone");
  auto flags = std::make_shared<BenchStepFlags>();
  flags->backend = "cuda";
  add_shape_flags(*command, *flags);
  return [flags] { return run_bench_select(*flags); };
}

}  // namespace compact::engine
