// The build without CUDA: the same promise, answered with the reason.
#include "engine/cuda/cuda_model.h"

namespace compact::engine {
namespace {

Status no_cuda() { return unsupported("this build has no CUDA; configure with -DCOMPACT_CUDA=ON (needs nvcc)"); }

}  // namespace

Result<CudaDeviceInfo> cuda_device_info() { return no_cuda(); }
Result<std::unique_ptr<Model>> load_cuda_model(const std::filesystem::path&) { return no_cuda(); }
Result<std::unique_ptr<Model>> make_random_cuda_model(const ModelConfig&, std::uint64_t) { return no_cuda(); }
CudaMemoryUse cuda_memory_use() noexcept { return {}; }
void reset_cuda_memory_peak() noexcept {}
Result<double> measure_cuda_gemm_tflops(std::int32_t) { return no_cuda(); }

}  // namespace compact::engine
