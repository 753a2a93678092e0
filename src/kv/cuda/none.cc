// The build without CUDA: the same promise, answered with the reason.
#include "compact/append_cuda.h"

namespace compact {
namespace {

Status no_cuda() {
  return unsupported(
      "append (cuda): this build has no CUDA backend; configure with -DCOMPACT_CUDA=ON (needs nvcc), or use "
      "PagedKvCache");
}

}  // namespace

Status rope_table_cuda(const CudaStepInput&, const float*, std::int32_t, float*, void*) { return no_cuda(); }

Status append_cuda(const CudaStepInput&, const CudaAppendInput&, const PagedKvView&, void*, std::int32_t*, void*) {
  return no_cuda();
}

}  // namespace compact
