// One way to launch every kernel of the chain.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace compact {

// `pdl`: the kernel may start before its predecessor in the stream has ended; it waits itself (griddep_wait).
// `cluster`: CTAs that share their memory, from 9.0 on; divides the grid.
template <class Args>
cudaError_t launch_kernel(void (*kernel)(Args), std::int32_t grid, std::int32_t block, std::int32_t smem_bytes,
                          bool pdl, cudaStream_t stream, const Args& args, std::int32_t cluster = 1) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned num_attributes = 0;
  if (pdl) {
    attributes[num_attributes].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[num_attributes++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[num_attributes].id = cudaLaunchAttributeClusterDimension;
    attributes[num_attributes++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = static_cast<std::size_t>(smem_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = num_attributes;
  void* values[] = {const_cast<Args*>(&args)};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), values);
}

}  // namespace compact
