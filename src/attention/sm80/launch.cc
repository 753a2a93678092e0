#include "src/attention/sm80/launch.h"

#include "src/core/launch_kernel.h"

namespace compact {
namespace {

Sm80Kernel kernel_for(DType dtype, std::int32_t head_dim) {
  switch (head_dim) {
    case 64: return sm80_kernel_d64(dtype);
    case 128: return sm80_kernel_d128(dtype);
    case 256: return sm80_kernel_d256(dtype);
    default: return nullptr;
  }
}

// Per device and kernel; cheap enough to set on every call.
cudaError_t allow_shared_memory(Sm80Kernel kernel, const Sm80Tile& tile) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              tile.smem_bytes());
}

}  // namespace

cudaError_t sm80_ctas_per_sm(DType dtype, std::int32_t head_dim, std::int32_t* ctas) {
  const Sm80Kernel kernel = kernel_for(dtype, head_dim);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  const Sm80Tile tile = sm80_tile(head_dim);
  const cudaError_t error = allow_shared_memory(kernel, tile);
  if (error != cudaSuccess) return error;
  int count = 0;
  const cudaError_t occupancy = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &count, reinterpret_cast<const void*>(kernel), tile.threads(), static_cast<std::size_t>(tile.smem_bytes()));
  *ctas = count;
  return occupancy;
}

cudaError_t sm80_launch_prefill(const PrefillParams& params, bool pdl, cudaStream_t stream) {
  const Sm80Kernel kernel = kernel_for(params.dtype, params.head_dim);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  const Sm80Tile tile = sm80_tile(params.head_dim);
  const cudaError_t error = allow_shared_memory(kernel, tile);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, params.num_workers, tile.threads(), tile.smem_bytes(), pdl, stream, params);
}

}  // namespace compact
