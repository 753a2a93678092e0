#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "benchmarks/device_fill.h"

namespace compact::bench {
namespace {

__global__ void fill_kernel(std::uint16_t* data, std::int64_t elements, bool f16, std::uint64_t seed) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < elements;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    std::uint64_t x = (static_cast<std::uint64_t>(i) + seed) * 0x9e3779b97f4a7c15ULL;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    x ^= x >> 31;
    const auto sum = static_cast<float>((x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48));
    const float value = (sum - 131070.0f) * (1.0f / 37837.0f);
    data[i] = f16 ? __half_as_ushort(__float2half_rn(value)) : __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
}

}  // namespace

cudaError_t fill_normal(void* data, std::int64_t elements, DType dtype, std::uint64_t seed) {
  fill_kernel<<<4096, 256>>>(static_cast<std::uint16_t*>(data), elements, dtype == DType::kF16, seed);
  return cudaGetLastError();
}

}  // namespace compact::bench
