#include "engine/model/backend.h"

#include <fmt/format.h>

#include "engine/cuda/cuda_model.h"

namespace compact::engine {

const char* backend_name(Backend backend) noexcept { return backend == Backend::kCuda ? "cuda" : "cpu"; }

Result<Backend> resolve_backend(std::string_view name) {
  if (name == "cpu") return Backend::kCpu;
  if (name != "auto" && name != "cuda") {
    return invalid_argument(fmt::format("--backend is '{}'\n  allowed: cpu, cuda, auto", name));
  }
  const Result<CudaDeviceInfo> device = cuda_device_info();
  if (device.ok() && device->usable) return Backend::kCuda;
  if (name == "auto") return Backend::kCpu;
  return unsupported(fmt::format("--backend is cuda: {}\n  allowed here: cpu",
                                 device.ok() ? device->gemm_library : device.status().message()));
}

Status check_backend_options(Backend backend, const SparsityOptions& options, DType kv_dtype) {
  if (backend == Backend::kCpu) return {};
  const auto missing = [](const std::string& seen, const char* allowed) {
    return unsupported(
        fmt::format("{} is not on the cuda backend yet\n  allowed: {}; or --backend cpu", seen, allowed));
  };
  if (kv_dtype != DType::kBF16) {
    return missing(fmt::format("--kv-dtype {}", dtype_name(kv_dtype)), "--kv-dtype bf16");
  }
  const std::string& name = options.selector.name;
  if (name != "dense" && name != "mean-key" && name != "random") {
    return missing(fmt::format("--selector {}", name), "dense, mean-key, random");
  }
  const MeanKeyOptions& rule = options.selector.mean_key;
  const MeanKeyOptions known;
  if (name == "mean-key" && (rule.alpha >= 0 || rule.tile != known.tile || rule.visible != known.visible ||
                             rule.norm != known.norm || rule.vote != known.vote)) {
    return missing("this rule of mean-key", "--preset mean-key with --share and --lift, --vote max");
  }
  if (name == "mean-key" && options.selector.budget.kind != BudgetKind::kNative) {
    return missing("--budget with mean-key", "--budget native");
  }
  return {};
}

}  // namespace compact::engine
