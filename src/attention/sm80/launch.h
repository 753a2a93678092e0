// Host entry of the portable kernel over page lists. The public API checks the caller's input, runs prepare before it
// and combine after it.
#pragma once

#include <cuda_runtime_api.h>

#include "src/attention/cuda/prefill_params.h"
#include "src/attention/sm80/sm80_config.h"

namespace compact {

// Asynchronous. `pdl`: the kernel may be launched while its predecessor still runs.
cudaError_t sm80_launch_prefill(const PrefillParams& params, bool pdl, cudaStream_t stream);

// CTAs of the kernel that fit one SM of the current device at once.
cudaError_t sm80_ctas_per_sm(DType dtype, std::int32_t head_dim, std::int32_t* ctas);

// One file per head dimension, so that they compile side by side.
using Sm80Kernel = void (*)(PrefillParams);
Sm80Kernel sm80_kernel_d64(DType dtype);
Sm80Kernel sm80_kernel_d128(DType dtype);
Sm80Kernel sm80_kernel_d256(DType dtype);

}  // namespace compact
