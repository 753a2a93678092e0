// One way to launch every kernel of the chain.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace compact {

// `pdl`: the kernel may start before its predecessor in the stream has ended; it waits itself (griddep_wait).
template <class Args>
cudaError_t launch_kernel(void (*kernel)(Args), std::int32_t grid, std::int32_t block, std::int32_t smem_bytes,
                          bool pdl, cudaStream_t stream, const Args& args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = static_cast<std::size_t>(smem_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = pdl ? 1 : 0;
  void* values[] = {const_cast<Args*>(&args)};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), values);
}

}  // namespace compact
