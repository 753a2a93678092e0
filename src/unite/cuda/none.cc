// The build without CUDA: the same promise, answered with the reason.
#include "compact/step_cuda.h"

namespace compact {
namespace {

Status no_cuda() {
  return unsupported(
      "step (cuda): this build has no CUDA backend; configure with -DCOMPACT_CUDA=ON (needs nvcc), or use Selector and "
      "build_page_lists");
}

}  // namespace

Result<CudaStepSizes> step_cuda_sizes(const CudaStepInput&) { return no_cuda(); }

Status plan_step_cuda(const CudaStepInput&, std::int32_t*, void*, std::int64_t, void*) { return no_cuda(); }

Status select_mean_key_cuda(const CudaStepInput&, const CudaMeanKeyInput&, std::uint64_t*, std::uint64_t*, void*,
                            std::int64_t, void*) {
  return no_cuda();
}

Status build_page_lists_cuda(const CudaStepInput&, const std::uint64_t*, const CudaPageLists&, void*, std::int64_t,
                             void*) {
  return no_cuda();
}

Status build_dense_lists_cuda(const CudaStepInput&, const CudaPageLists&, void*, std::int64_t, void*) {
  return no_cuda();
}

Status page_means_cuda(const CudaStepInput&, const PagedKvView&, void*, std::int32_t*, void*) { return no_cuda(); }

}  // namespace compact
