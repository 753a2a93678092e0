// The build without CUDA: the same promise, answered with the reason.
#include "engine/bench/attention_cuda.h"
#include "engine/bench/step_cuda.h"

namespace compact::engine {
namespace {

Status no_cuda() {
  return unsupported("--backend cuda: this build has no CUDA backend; configure with -DCOMPACT_CUDA=ON (needs nvcc)");
}

}  // namespace

Result<CudaBenchDevice> cuda_bench_device() { return no_cuda(); }

Status bench_attention_cuda(const AttentionBenchOptions&, const std::function<void(const AttentionRow&)>&) {
  return no_cuda();
}

Result<std::vector<StepRow>> bench_step_cuda(const StepShape&, std::int32_t, std::int32_t, double, bool) {
  return no_cuda();
}

}  // namespace compact::engine
