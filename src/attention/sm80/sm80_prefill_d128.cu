#include "src/attention/sm80/launch.h"
#include "src/attention/sm80/sm80_prefill.cuh"

namespace compact {

Sm80Kernel sm80_kernel_d128(DType dtype) {
  return dtype == DType::kF16 ? sm80_prefill_kernel<__half, 128> : sm80_prefill_kernel<__nv_bfloat16, 128>;
}

}  // namespace compact
