/// `compact doctor`: what this machine can run, and why not the rest.
#include <fmt/format.h>
#include <unistd.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "compact/attention.h"
#include "compact/selector.h"
#include "compact/thread_pool.h"
#include "compact/version.h"
#include "engine/cli/commands.h"
#include "engine/cuda/cuda_model.h"
#include "engine/loader/text_file.h"
#include "engine/scheduler/answer.h"

namespace compact::engine {
namespace {

struct DoctorFlags {
  std::string model_directory;
  std::string json_file;
};

double memory_gigabytes(int pages_name) {
  return static_cast<double>(sysconf(pages_name)) * static_cast<double>(sysconf(_SC_PAGESIZE)) / 1e9;
}

Status doctor(const DoctorFlags& flags) {
  if (!flags.json_file.empty()) CA_RETURN_IF_ERROR(check_writable(flags.json_file));
  const ThreadPool pool;
  nlohmann::json json = {{"version", CA_VERSION_STRING},
                         {"cpu_target", cpu_attention_target()},
                         {"threads", pool.num_threads()},
                         {"memory_gb", memory_gigabytes(_SC_PHYS_PAGES)},
                         {"memory_available_gb", memory_gigabytes(_SC_AVPHYS_PAGES)},
                         {"selectors", selector_names()},
                         {"modes", {"paper", "span", "tile", "adaptive"}},
                         {"architectures", {"LlamaForCausalLM", "Qwen3ForCausalLM"}}};
  fmt::print("compact {}\n", CA_VERSION_STRING);
  fmt::print("backend cpu      yes: {} kernels, {} threads, {:.1f} GB memory ({:.1f} GB free)\n",
             cpu_attention_target(), pool.num_threads(), memory_gigabytes(_SC_PHYS_PAGES),
             memory_gigabytes(_SC_AVPHYS_PAGES));
  json["backends"] = {"cpu"};
  const Result<CudaDeviceInfo> device = cuda_device_info();
  if (!device.ok()) {
    fmt::print("backend cuda     no: {}\n", device.status().message());
  } else {
    const double gigabytes = 1e9;
    fmt::print("backend cuda     {}: {}, compute capability {}.{}, {} SMs, {:.1f} GB memory ({:.1f} GB free), {}\n",
               device->usable ? "yes" : "no", device->name, device->capability / 10, device->capability % 10,
               device->num_sms, static_cast<double>(device->memory_bytes) / gigabytes,
               static_cast<double>(device->free_bytes) / gigabytes, device->gemm_library);
    if (device->usable) {
      json["backends"].push_back("cuda");
      json["cuda_device"] = {{"name", device->name},
                             {"capability", device->capability},
                             {"memory_gb", static_cast<double>(device->memory_bytes) / gigabytes},
                             {"selectors", "dense, mean-key, random; the others select on the CPU"}};
    }
  }
  fmt::print("selectors        {}\n", selector_names());
  fmt::print("union modes      paper, span, tile, adaptive\n");
  fmt::print("architectures    LlamaForCausalLM, Qwen3ForCausalLM (dense); weights F32, BF16, F16\n");
  if (!flags.model_directory.empty()) {
    CA_ASSIGN_OR_RETURN(const LoadedModel model, load_model(flags.model_directory, "auto", Backend::kCpu));
    const ModelConfig& config = model.transformer->config();
    fmt::print("model            {}: {}, {} layers, Hq {}, Hkv {}, D {}, {} positions, {:.1f} MB, chat format {}\n",
               flags.model_directory, architecture_name(config.architecture), config.num_hidden_layers,
               config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.max_position_embeddings,
               static_cast<double>(model.transformer->weight_bytes()) / 1e6, chat_format_name(model.chat_format));
    json["model"] = {{"directory", flags.model_directory},
                     {"architecture", architecture_name(config.architecture)},
                     {"layers", config.num_hidden_layers},
                     {"positions", config.max_position_embeddings},
                     {"weight_bytes", model.transformer->weight_bytes()},
                     {"chat_format", chat_format_name(model.chat_format)}};
  }
  if (!flags.json_file.empty()) return write_text_file(flags.json_file, json.dump(2) + "\n");
  return {};
}

}  // namespace

CommandBody add_doctor_command(CLI::App& app) {
  const auto flags = std::make_shared<DoctorFlags>();
  CLI::App* command = app.add_subcommand("doctor", "Say what this machine can run, and why not the rest");
  command->add_option("-m,--model", flags->model_directory, "Also check that this model directory can be loaded");
  command->add_option("--json", flags->json_file, "Write the findings to this file");
  return [flags] { return doctor(*flags); };
}

}  // namespace compact::engine
