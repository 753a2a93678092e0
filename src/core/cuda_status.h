/// Errors of the CUDA runtime as statuses.
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "compact/status.h"

namespace compact {

/// kCudaError names the caller, what it did, and the runtime's own words.
[[nodiscard]] inline Status cuda_status(const char* caller, cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return cuda_error(fmt::format("{}: {}: {} ({})", caller, what, cudaGetErrorString(error), cudaGetErrorName(error)));
}

}  // namespace compact
