/// `compact bench attention`: attention over page lists on a GPU, beside the matrix products of the same minute and, if
/// asked for, other kernels in one process.
#include <fmt/format.h>
#include <spawn.h>
#include <sys/wait.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/bench/attention_cuda.h"
#include "engine/bench/step_cuda.h"
#include "engine/cli/commands.h"
#include "engine/cuda/cuda_model.h"
#include "engine/loader/text_file.h"

extern char** environ;

namespace compact::engine {
namespace {

constexpr std::int32_t kGemmSize = 8192;

struct BenchAttentionFlags {
  std::string backend = "cuda";
  std::string kernel = "sm90";
  bool quick = false;
  std::string filter;
  bool peers = false;
  std::string peer_script = "benchmarks/attention_gpu_compare.py";
  std::string library;  // empty: libcompact.so beside the executable
  std::string json;
};

Status run_program(const std::vector<std::string>& command) {
  std::vector<char*> arguments;
  for (const std::string& argument : command) arguments.push_back(const_cast<char*>(argument.c_str()));
  arguments.push_back(nullptr);
  pid_t child = 0;
  const int error = posix_spawnp(&child, arguments[0], nullptr, nullptr, arguments.data(), environ);
  if (error != 0) return io_error(fmt::format("{} does not start: {}", command.front(), std::strerror(error)));
  int status = 0;
  if (waitpid(child, &status, 0) != child) return io_error(fmt::format("{} was lost", command.front()));
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return {};
  return io_error(fmt::format("{} {} failed: {} {}", command[0], command[1], WIFEXITED(status) ? "exit" : "signal",
                              WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status)));
}

// The other kernels take turns with ours in one process: a GPU under load changes its clock from minute to minute.
Status run_peers(const BenchAttentionFlags& flags, nlohmann::json& figures) {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::path library = flags.library.empty()
                               ? fs::read_symlink("/proc/self/exe", error).parent_path() / "libcompact.so"
                               : fs::path(flags.library);
  for (const fs::path& file : {fs::path(flags.peer_script), library}) {
    if (!fs::exists(file, error)) {
      return invalid_argument(fmt::format(
          "--peers: {} is not there\n  see: --peer-script, --library (-DCOMPACT_SHARED=ON)", file.string()));
    }
  }
  std::vector<std::string> command = {"python3",        flags.peer_script, "--library",
                                      library.string(), "--filter",        flags.filter};
  if (flags.quick) command.emplace_back("--quick");
  const std::string json = flags.json + ".peers";
  if (!flags.json.empty()) command.insert(command.end(), {"--json", json});
  CA_RETURN_IF_ERROR(run_program(command));
  if (flags.json.empty()) return {};
  std::ifstream file(json);
  figures["peers"] = nlohmann::json::parse(file, nullptr, false);
  file.close();
  fs::remove(json, error);
  if (figures["peers"].is_discarded()) return io_error(fmt::format("{} is not JSON", json));
  return {};
}

Status run_bench_attention(const BenchAttentionFlags& flags) {
  if (flags.backend != "cuda") {
    return unsupported(fmt::format("--backend is '{}'; bench attention times: cuda", flags.backend));
  }
  if (!flags.json.empty()) CA_RETURN_IF_ERROR(check_writable(flags.json));
  AttentionBenchOptions options{.quick = flags.quick, .filter = flags.filter};
  if (flags.kernel != "sm90") options.kernels = {CudaBackend::kSm80};
  if (flags.kernel == "all") options.kernels = {CudaBackend::kSm90, CudaBackend::kSm80};
  CA_ASSIGN_OR_RETURN(const CudaBenchDevice device, cuda_bench_device());
  nlohmann::json figures = {{"backend", "cuda"}, {"device", device.name}, {"rows", nlohmann::json::array()}};
  fmt::print("{}\n", device.name);
  if (const Result<double> rate = measure_cuda_gemm_tflops(kGemmSize); rate.ok()) {
    fmt::print("bf16 product of {0} x {0} matrices: {1:.1f} TFLOP/s\n", kGemmSize, *rate);
    figures["gemm_tflops"] = *rate;
  } else {
    fmt::print("bf16 product: not timed: {}\n", rate.status().message());
  }
  CA_RETURN_IF_ERROR(bench_attention_cuda(options, [&](const AttentionRow& row) {
    fmt::print("{:44} {} {:9.4f} ms (min {:9.4f}) {:6.1f} TFLOP/s  dense-equivalent {:7.1f}", row.name, row.kernel,
               row.median_ms, row.min_ms, row.tflops, row.dense_tflops);
    if (row.difference > 0) fmt::print("  max difference {:.4f}", row.difference);
    fmt::print("\n");
    figures["rows"].push_back({{"name", row.name},
                               {"backend", row.kernel},
                               {"ms_median", row.median_ms},
                               {"ms_min", row.min_ms},
                               {"tflops", row.tflops},
                               {"effective_dense_tflops", row.dense_tflops}});
  }));
  std::fflush(stdout);
  if (flags.peers) CA_RETURN_IF_ERROR(run_peers(flags, figures));
  return flags.json.empty() ? Status() : write_text_file(flags.json, figures.dump(2) + "\n");
}

}  // namespace

CommandBody add_bench_attention_command(CLI::App& bench) {
  CLI::App* command = bench.add_subcommand("attention", "Attention over page lists on a fixed set of shapes");
  auto flags = std::make_shared<BenchAttentionFlags>();
  command->add_option("--backend", flags->backend, "Where to compute: cuda")->capture_default_str();
  command->add_option("--kernel", flags->kernel, "Which of our kernels")
      ->check(CLI::IsMember({"sm90", "sm80", "all"}))
      ->capture_default_str();
  command->add_flag("--quick", flags->quick, "The shapes of the targets only");
  command->add_option("--filter", flags->filter, "Shapes whose name contains this");
  command->add_flag("--peers", flags->peers, "Then cuDNN and FlashAttention-2 of PyTorch beside ours, in one process");
  command->add_option("--peer-script", flags->peer_script, "The program that --peers runs by python3")
      ->capture_default_str();
  command->add_option("--library", flags->library, "libcompact.so for --peers; beside the executable if not given");
  command->add_option("--json", flags->json, "Write the figures to this file");
  return [flags] { return run_bench_attention(*flags); };
}

}  // namespace compact::engine
