// Host entry of the sm_90a prefill kernel over page lists. The public API checks the caller's input, runs the prepare
// kernel before this and the combine kernel after it.
#pragma once

#include <cuda_runtime_api.h>

#include "compact/status.h"
#include "src/attention/cuda/prefill_params.h"

namespace compact {

// Item tiles are in units of sm90_tile(head_dim); num_workers is the number of SMs: one CTA owns all shared memory of
// its SM. The kernel may be launched while its predecessor still runs. Errors: kInvalidArgument (the driver refuses a
// tensor map), kUnsupported (no tensor maps in the driver), kCudaError.
[[nodiscard]] Status sm90_launch_prefill(const PrefillParams& params, cudaStream_t stream);

}  // namespace compact
