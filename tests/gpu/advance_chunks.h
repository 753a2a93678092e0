/// What a scheduler would do between steps, on the device: the next chunk of every request.
#pragma once

#include <cuda_runtime_api.h>

#include "compact/step_cuda.h"

namespace compact::testing {

/// Moves each chunk to the rows and positions behind it.
cudaError_t advance_chunks(CudaChunk* chunks, std::int32_t num_chunks, cudaStream_t stream);

}  // namespace compact::testing
