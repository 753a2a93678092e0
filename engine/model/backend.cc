#include "engine/model/backend.h"

#include <fmt/format.h>

#include "compact/select_cuda.h"
#include "engine/cuda/cuda_model.h"

namespace compact::engine {

const char* backend_name(Backend backend) noexcept { return backend == Backend::kCuda ? "cuda" : "cpu"; }

Result<Backend> resolve_backend(std::string_view name) {
  if (name == "cpu") return Backend::kCpu;
  if (name != "auto" && name != "cuda") {
    return invalid_argument(fmt::format("--backend is '{}'\n  allowed: cpu, cuda, auto", name));
  }
  // Looking starts cuBLASLt, and every set of flags is resolved anew: once is enough.
  static const Result<CudaDeviceInfo> device = cuda_device_info();
  if (device.ok() && device->usable) return Backend::kCuda;
  if (name == "auto") return Backend::kCpu;
  return unsupported(fmt::format("--backend is cuda: {}\n  allowed here: cpu",
                                 device.ok() ? device->gemm_library : device.status().message()));
}

Status check_backend_options(Backend backend, DType kv_dtype) {
  if (backend == Backend::kCpu || kv_dtype == DType::kBF16) return {};
  return unsupported(fmt::format("--kv-dtype {} is not on the cuda backend yet\n  allowed: bf16; or --backend cpu",
                                 dtype_name(kv_dtype)));
}

bool selects_on_gpu(const SparsityOptions& options) {
  // Any model with groups will do; gates know theirs.
  const GateWeights* const gates = options.selector.name == "seer" ? options.selector.seer.gates.get() : nullptr;
  const std::int32_t q_heads = gates == nullptr ? 2 : gates->num_q_heads;
  const std::int32_t kv_heads = gates == nullptr ? 1 : gates->num_kv_heads;
  const Result<CudaMaskShape> shape = cuda_mask_shape(options.selector, q_heads, kv_heads, 128);
  return shape.ok() && (shape->mask_heads == kv_heads || options.unite.heads_per_unit != kCheapestHeads);
}

}  // namespace compact::engine
