#include "src/attention/sm80/launch.h"
#include "src/attention/sm80/sm80_prefill.cuh"

namespace compact {

Sm80Kernel sm80_kernel_d64(DType dtype) {
  return dtype == DType::kF16 ? sm80_prefill_kernel<__half, 64> : sm80_prefill_kernel<__nv_bfloat16, 64>;
}

}  // namespace compact
