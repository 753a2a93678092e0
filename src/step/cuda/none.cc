// The build without CUDA: the same promise, answered with the reason.
#include "compact/select_cuda.h"

namespace compact {
namespace {

Status no_cuda() {
  return unsupported(
      "select (cuda): this build has no CUDA backend; configure with -DCOMPACT_CUDA=ON (needs nvcc), or use Selector");
}

}  // namespace

Result<std::int64_t> select_cuda_bytes(const CudaStepInput&, const CudaSelectInput&) { return no_cuda(); }

Status select_cuda(const CudaStepInput&, const CudaSelectInput&, std::uint64_t*, std::uint64_t*, void*, std::int64_t,
                   void*, std::int64_t, void*) {
  return no_cuda();
}

Status page_summaries_cuda(const CudaStepInput&, const PagedKvView&, const CudaPageSummaries&, void*) {
  return no_cuda();
}

Status gate_pools_cuda(const CudaStepInput&, const PagedKvView&, const CudaPageSummaries&, void*) { return no_cuda(); }

}  // namespace compact
