// Counts and places of the experts never leave the device, and no sum is by atomics: the same tokens give the same
// bits.
#include <cmath>

#include "engine/cuda/expert_kernels.h"
#include "engine/cuda/vector.cuh"

namespace compact::engine {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Unsigned numbers in the order of the floats; NaN counts as -inf.
__device__ __forceinline__ unsigned ordered(float x) {
  const unsigned bits = __float_as_uint(fmaxf(x, -INFINITY) + 0.0f);  // -0 becomes 0
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

// A warp per token; lane l looks after experts l, l + 32, ..., 32 of them at most.
__global__ void __launch_bounds__(kThreads)
    route_kernel(const float* logits, std::int32_t rows, std::int32_t num_experts, std::int32_t per_token,
                 bool normalize, std::int32_t* experts, float* weights) {
  const auto row = static_cast<std::int32_t>(blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (row >= rows) return;
  const float* const of_row = logits + std::int64_t{row} * num_experts;
  unsigned taken = 0;    // bit i: expert lane + 32 i
  float top = 0;         // the highest logit of all
  float chosen_sum = 0;  // of exp(logit - top) over the chosen
  float own_weight = 0;  // of choice number `lane`
  for (int j = 0; j < per_token; ++j) {
    unsigned best = 0;  // below that of -inf
    int expert = num_experts;
    for (int i = 0; lane + kWarp * i < num_experts; ++i) {
      const unsigned key = ordered(of_row[lane + kWarp * i]);
      if ((taken >> i & 1u) != 0 || key <= best) continue;
      best = key;
      expert = lane + kWarp * i;
    }
    const unsigned highest = __reduce_max_sync(kAllLanes, best);
    expert = __reduce_min_sync(kAllLanes, best == highest ? expert : num_experts);
    if (expert % kWarp == lane) taken |= 1u << (expert / kWarp);
    const float logit = of_row[expert];
    if (j == 0) top = logit;
    const float weight = expf(logit - top);
    chosen_sum += weight;
    if (lane == j) own_weight = weight;
    if (lane == 0) experts[std::int64_t{row} * per_token + j] = expert;
  }
  float sum = chosen_sum;
  if (!normalize) {
    sum = 0;
    for (int expert = lane; expert < num_experts; expert += kWarp) sum += expf(of_row[expert] - top);
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  }
  if (lane < per_token) weights[std::int64_t{row} * per_token + lane] = own_weight / sum;
}

// A CTA per expert. Each counts the pairs of the experts before its own, so none waits for another; a warp reads a run
// of pairs, 32 at a time, so its own pairs stand in order.
constexpr int kSortThreads = 1024;
constexpr int kSortWarps = kSortThreads / kWarp;

__global__ void __launch_bounds__(kSortThreads)
    sort_kernel(const std::int32_t* experts, std::int32_t num_pairs, std::int32_t per_token, std::int32_t* token_of,
                std::int32_t* place_of, GroupTile* tiles) {
  __shared__ std::int32_t lower_of_warp[kSortWarps], equal_of_warp[kSortWarps];
  const auto own = static_cast<std::int32_t>(blockIdx.x);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const std::int32_t run = (num_pairs + kSortThreads - 1) / kSortThreads * kWarp;
  const std::int32_t begin = min(num_pairs, warp * run);
  const std::int32_t end = min(num_pairs, begin + run);
  std::int32_t lower = 0, equal = 0;
#pragma unroll 4
  for (std::int32_t i = begin + lane; i - lane < end; i += kWarp) {
    const std::int32_t expert = i < end ? experts[i] : INT32_MAX;
    lower += __popc(__ballot_sync(kAllLanes, expert < own));
    equal += __popc(__ballot_sync(kAllLanes, expert == own));
  }
  if (lane == 0) lower_of_warp[warp] = lower;
  if (lane == 0) equal_of_warp[warp] = equal;
  __syncthreads();
  std::int32_t first_row = 0, rows = 0, before = 0;
  for (int i = 0; i < kSortWarps; ++i) {
    first_row += lower_of_warp[i];
    rows += equal_of_warp[i];
    if (i < warp) before += equal_of_warp[i];
  }
  std::int32_t place = first_row + before;
  for (std::int32_t i = begin + lane; equal > 0 && i - lane < end; i += kWarp) {
    const bool is_own = i < end && experts[i] == own;
    const unsigned owns = __ballot_sync(kAllLanes, is_own);
    if (is_own) {
      const std::int32_t at = place + __popc(owns & ((1u << lane) - 1));
      token_of[at] = i / per_token;
      place_of[i] = at;
    }
    place += __popc(owns);
  }
  const std::int32_t first_tile = first_row / kGroupTileRows + own;
  const std::int32_t end_tile = (first_row + rows) / kGroupTileRows + own + 1;
  for (std::int32_t t = first_tile + static_cast<std::int32_t>(threadIdx.x); t < end_tile; t += kSortThreads) {
    const std::int32_t done = (t - first_tile) * kGroupTileRows;
    tiles[t] = {own, first_row + done, max(0, min(kGroupTileRows, rows - done))};
  }
}

__global__ void add_experts_kernel(const Vector* outputs, const std::int32_t* place_of, const float* weights,
                                   std::int32_t per_token, std::int32_t row_vectors, Vector* residual) {
  const std::int64_t row = blockIdx.y;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= row_vectors) return;
  float sum[kVector], output[kVector];
  widen(residual[row * row_vectors + i], sum);
  for (std::int32_t j = 0; j < per_token; ++j) {
    const float weight = weights[row * per_token + j];
    widen(outputs[std::int64_t{place_of[row * per_token + j]} * row_vectors + i], output);
#pragma unroll
    for (int k = 0; k < kVector; ++k) sum[k] += weight * output[k];
  }
  residual[row * row_vectors + i] = narrow(sum);
}

}  // namespace

cudaError_t launch_route_to_experts(const float* logits, std::int32_t rows, std::int32_t num_experts,
                                    std::int32_t per_token, bool normalize, std::int32_t* experts, float* weights,
                                    cudaStream_t stream) {
  constexpr std::int32_t kRowsPerCta = kThreads / kWarp;
  route_kernel<<<static_cast<unsigned>((rows + kRowsPerCta - 1) / kRowsPerCta), kThreads, 0, stream>>>(
      logits, rows, num_experts, per_token, normalize, experts, weights);
  return cudaGetLastError();
}

cudaError_t launch_sort_by_expert(const std::int32_t* experts, std::int32_t rows, std::int32_t per_token,
                                  std::int32_t num_experts, std::int32_t* token_of, std::int32_t* place_of,
                                  GroupTile* tiles, cudaStream_t stream) {
  sort_kernel<<<static_cast<unsigned>(num_experts), kSortThreads, 0, stream>>>(experts, rows * per_token, per_token,
                                                                               token_of, place_of, tiles);
  return cudaGetLastError();
}

cudaError_t launch_add_experts(const Bf16Bits* outputs, const std::int32_t* place_of, const float* weights,
                               std::int32_t rows, std::int32_t per_token, std::int32_t width, Bf16Bits* residual,
                               cudaStream_t stream) {
  const std::int32_t row_vectors = width / kVector;
  const dim3 grid(static_cast<unsigned>((row_vectors + kThreads - 1) / kThreads), static_cast<unsigned>(rows));
  add_experts_kernel<<<grid, kThreads, 0, stream>>>(vectors(outputs), place_of, weights, per_token, row_vectors,
                                                    reinterpret_cast<Vector*>(residual));
  return cudaGetLastError();
}

}  // namespace compact::engine
