#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>
#include <type_traits>

#include "src/attention/reference/attention_cuda.h"

namespace compact {
namespace {

struct ReferenceArgs {
  CudaAttentionInput input;
  float* o;    // [T, Hq, D]
  float* lse;  // [T, Hq] or null
};

__device__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <class Element>
__device__ float rounded(float x) {
  if constexpr (std::is_same_v<Element, __half>) return __half2float(__float2half_rn(x));
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) return __bfloat162float(__float2bfloat16_rn(x));
}

// One warp per (unit, token, head); grid.x over units, the warps of a CTA and its y share over rows of the unit.
template <class Element, int kHeadDim, bool kRoundWeights>
__global__ void reference_kernel(const ReferenceArgs args) {
  constexpr int kPerLane = kHeadDim / 32;  // dimension i * 32 + lane
  const CudaAttentionInput& in = args.input;
  const PagedKvView& kv = in.kv;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_units = in.num_units == nullptr ? in.max_units : *in.num_units;
  if (static_cast<int>(blockIdx.x) >= num_units) return;
  const AttentionUnit unit = in.units[blockIdx.x];
  const int rows = unit.q_len * in.heads_per_unit;
  const int warps = static_cast<int>(blockDim.x / 32 * gridDim.y);
  for (int row = static_cast<int>(blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32); row < rows; row += warps) {
    const int i = row / in.heads_per_unit;
    const long long token = unit.q_begin + i;
    const int head = unit.q_head + row % in.heads_per_unit;
    const auto* q = static_cast<const Element*>(in.q) + token * in.q_token_stride + head * in.q_head_stride;
    float query[kPerLane];
    for (int d = 0; d < kPerLane; ++d) query[d] = static_cast<float>(q[d * 32 + lane]);
    const auto at = [&](long long c) {
      const int page = in.page_ids[unit.list_begin + c / kv.page_tokens];
      return page * kv.page_stride + c % kv.page_tokens * kv.token_stride + unit.kv_head * kv.head_stride;
    };
    const auto score = [&](long long c) {
      const auto* k = static_cast<const Element*>(kv.k) + at(c);
      float dot = 0;
      for (int d = 0; d < kPerLane; ++d) dot += query[d] * static_cast<float>(k[d * 32 + lane]);
      return warp_sum(dot) * in.softmax_scale;
    };
    const long long limit = min(static_cast<long long>(unit.list_tokens),
                                static_cast<long long>(unit.past_tokens) + unit.causal_shift + i + 1);
    float largest = -INFINITY;
    for (long long c = 0; c < limit; ++c) largest = fmaxf(largest, score(c));
    float sum = 0;
    float mixed[kPerLane] = {};
    for (long long c = 0; c < limit; ++c) {
      const float weight = expf(score(c) - largest);
      sum += weight;
      const float used = kRoundWeights ? rounded<Element>(weight) : weight;
      const auto* v = static_cast<const Element*>(kv.v) + at(c);
      for (int d = 0; d < kPerLane; ++d) mixed[d] += used * static_cast<float>(v[d * 32 + lane]);
    }
    const long long out = token * in.num_q_heads + head;
    for (int d = 0; d < kPerLane; ++d) args.o[out * kHeadDim + d * 32 + lane] = sum > 0 ? mixed[d] / sum : 0.0f;
    if (args.lse != nullptr && lane == 0) args.lse[out] = sum > 0 ? largest + logf(sum) : -INFINITY;
  }
}

using Kernel = void (*)(ReferenceArgs);

template <class Element, int kHeadDim>
Kernel kernel_for(bool round_weights) {
  return round_weights ? reference_kernel<Element, kHeadDim, true> : reference_kernel<Element, kHeadDim, false>;
}

template <class Element>
Kernel kernel_for(std::int32_t head_dim, bool round_weights) {
  switch (head_dim) {
    case 64: return kernel_for<Element, 64>(round_weights);
    case 128: return kernel_for<Element, 128>(round_weights);
    case 256: return kernel_for<Element, 256>(round_weights);
    default: return nullptr;
  }
}

}  // namespace

Status attend_cuda_reference(const CudaAttentionInput& input, float* o, float* lse, bool round_weights, void* stream) {
  if (input.max_units == 0) return {};
  const Kernel kernel = input.kv.dtype == DType::kF16 ? kernel_for<__half>(input.kv.head_dim, round_weights)
                                                      : kernel_for<__nv_bfloat16>(input.kv.head_dim, round_weights);
  if (kernel == nullptr) return unsupported("attention reference (cuda): head dimensions 64, 128, 256");
  // Enough warps to fill the device with few units; 1 y block of 8 warps with many.
  const unsigned blocks = input.max_units >= 4096 ? 1 : static_cast<unsigned>(4096 / input.max_units);
  kernel<<<dim3(static_cast<unsigned>(input.max_units), blocks), 256, 0, static_cast<cudaStream_t>(stream)>>>(
      ReferenceArgs{input, o, lse});
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? Status() : cuda_error(std::string("attention reference: ") + cudaGetErrorString(error));
}

}  // namespace compact
