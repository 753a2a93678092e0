// All of these are bound by memory: 16 bytes a thread and load, one pass over the data.
#include <algorithm>

#include "engine/cuda/kernels.h"
#include "engine/cuda/vector.cuh"

namespace compact::engine {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;

__global__ void embed_kernel(const std::int32_t* tokens, const Vector* table, std::int32_t row_vectors, Vector* out) {
  const std::int64_t row = blockIdx.x;
  const std::int64_t from = std::int64_t{tokens[row]} * row_vectors;
  for (int i = static_cast<int>(threadIdx.x); i < row_vectors; i += static_cast<int>(blockDim.x)) {
    out[row * row_vectors + i] = table[from + i];
  }
}

__device__ float block_sum(float value) {
  __shared__ float of_warp[kThreads / kWarp];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += of_warp[warp];
  return total;
}

// A CTA per row; a row is read a second time from cache.
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const Vector* x, const float* weight, float eps, std::int32_t row_vectors, Vector* out) {
  const std::int64_t row = std::int64_t{blockIdx.x} * row_vectors;
  float squares = 0;
  float values[kVector];
  for (int i = static_cast<int>(threadIdx.x); i < row_vectors; i += kThreads) {
    widen(x[row + i], values);
#pragma unroll
    for (int j = 0; j < kVector; ++j) squares += values[j] * values[j];
  }
  const float scale = rsqrtf(block_sum(squares) / static_cast<float>(row_vectors * kVector) + eps);
  for (int i = static_cast<int>(threadIdx.x); i < row_vectors; i += kThreads) {
    widen(x[row + i], values);
#pragma unroll
    for (int j = 0; j < kVector; ++j) values[j] *= scale * weight[i * kVector + j];
    out[row + i] = narrow(values);
  }
}

__global__ void silu_multiply_kernel(const Vector* gate_up, std::int32_t row_vectors, Vector* out) {
  const std::int64_t row = blockIdx.y;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= row_vectors) return;
  float gate[kVector], up[kVector];
  widen(gate_up[2 * row * row_vectors + i], gate);
  widen(gate_up[(2 * row + 1) * row_vectors + i], up);
#pragma unroll
  for (int j = 0; j < kVector; ++j) gate[j] = gate[j] / (1.0f + __expf(-gate[j])) * up[j];
  out[row * row_vectors + i] = narrow(gate);
}

__global__ void narrow_kernel(const float* x, std::int64_t count, __nv_bfloat16* out) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    out[i] = __float2bfloat16_rn(x[i]);
  }
}

// splitmix64's finaliser: every bit of the key reaches every bit of the result.
__device__ std::uint64_t mix(std::uint64_t key) {
  key += 0x9e3779b97f4a7c15ull;
  key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9ull;
  key = (key ^ (key >> 27)) * 0x94d049bb133111ebull;
  return key ^ (key >> 31);
}

__global__ void fill_random_kernel(std::uint64_t seed, float limit, std::int64_t count, __nv_bfloat16* out) {
  const std::uint64_t stream = mix(seed);
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    const auto unit = static_cast<float>(mix(stream + static_cast<std::uint64_t>(i)) >> 40) * 0x1p-24f;
    out[i] = __float2bfloat16_rn((2 * unit - 1) * limit);
  }
}

unsigned grid_for(std::int64_t count) {
  return static_cast<unsigned>(std::clamp<std::int64_t>((count + kThreads - 1) / kThreads, 1, 65536));
}

}  // namespace

cudaError_t launch_embed(const std::int32_t* tokens, const Bf16Bits* table, std::int32_t rows, std::int32_t width,
                         Bf16Bits* out, cudaStream_t stream) {
  embed_kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(tokens, vectors(table), width / kVector,
                                                                     reinterpret_cast<Vector*>(out));
  return cudaGetLastError();
}

cudaError_t launch_rms_norm(const Bf16Bits* x, const float* weight, float eps, std::int32_t rows, std::int32_t width,
                            Bf16Bits* out, cudaStream_t stream) {
  rms_norm_kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(vectors(x), weight, eps, width / kVector,
                                                                        reinterpret_cast<Vector*>(out));
  return cudaGetLastError();
}

cudaError_t launch_silu_multiply(const Bf16Bits* gate_up, std::int32_t rows, std::int32_t width, Bf16Bits* out,
                                 cudaStream_t stream) {
  const std::int32_t row_vectors = width / kVector;
  const dim3 grid(static_cast<unsigned>((row_vectors + kThreads - 1) / kThreads), static_cast<unsigned>(rows));
  silu_multiply_kernel<<<grid, kThreads, 0, stream>>>(vectors(gate_up), row_vectors, reinterpret_cast<Vector*>(out));
  return cudaGetLastError();
}

cudaError_t launch_narrow(const float* x, std::int64_t count, Bf16Bits* out, cudaStream_t stream) {
  narrow_kernel<<<grid_for(count), kThreads, 0, stream>>>(x, count, reinterpret_cast<__nv_bfloat16*>(out));
  return cudaGetLastError();
}

cudaError_t launch_fill_random(std::uint64_t seed, float limit, std::int64_t count, Bf16Bits* out,
                               cudaStream_t stream) {
  fill_random_kernel<<<grid_for(count), kThreads, 0, stream>>>(seed, limit, count,
                                                               reinterpret_cast<__nv_bfloat16*>(out));
  return cudaGetLastError();
}

}  // namespace compact::engine
