// The build without CUDA: the same promise, answered with the reason.
#include "compact/attention_cuda.h"

namespace compact {
namespace {

Status no_cuda() {
  return unsupported(
      "attention: this build has no CUDA backend; configure with -DCOMPACT_CUDA=ON (needs nvcc), or use attend_cpu");
}

}  // namespace

Result<CudaDevice> current_cuda_device() { return no_cuda(); }

Result<std::int64_t> attend_cuda_workspace_bytes(const CudaAttentionInput&, const CudaAttentionOptions&) {
  return no_cuda();
}

Status attend_cuda(const CudaAttentionInput&, const CudaAttentionOutput&, const CudaAttentionOptions&, void*,
                   std::int64_t, void*) {
  return no_cuda();
}

}  // namespace compact
