// Random data for GPU benchmarks, made on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "compact/tensor_view.h"

namespace compact::bench {

// Fills `elements` 16-bit values with roughly normal numbers; the same seed gives the same data.
cudaError_t fill_normal(void* data, std::int64_t elements, DType dtype, std::uint64_t seed);

}  // namespace compact::bench
