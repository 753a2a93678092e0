#include "src/attention/sm80/launch.h"
#include "src/attention/sm80/sm80_prefill.cuh"

namespace compact {

Sm80Kernel sm80_kernel_d64(DType dtype) {
  return dtype == DType::kF16 ? sm80_prefill_kernel<ptx::MmaType::kF16, 64>
                              : sm80_prefill_kernel<ptx::MmaType::kBf16, 64>;
}

}  // namespace compact
