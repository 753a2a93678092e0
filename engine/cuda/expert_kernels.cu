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

// Of equals the lower expert; -inf stands for what was taken, and for NaN.
struct Candidate {
  float logit;
  int expert;
};
__device__ __forceinline__ Candidate better(Candidate a, Candidate b) {
  return b.logit > a.logit || (b.logit == a.logit && b.expert < a.expert) ? b : a;
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
    Candidate best = {-INFINITY, num_experts};
    for (int i = 0; lane + kWarp * i < num_experts; ++i) {
      if ((taken >> i & 1u) != 0) continue;
      best = better(best, {fmaxf(of_row[lane + kWarp * i], -INFINITY), lane + kWarp * i});
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      best =
          better(best, {__shfl_xor_sync(kAllLanes, best.logit, step), __shfl_xor_sync(kAllLanes, best.expert, step)});
    }
    if (best.expert % kWarp == lane) taken |= 1u << (best.expert / kWarp);
    if (j == 0) top = best.logit;
    const float weight = expf(best.logit - top);
    chosen_sum += weight;
    if (lane == j) own_weight = weight;
    if (lane == 0) experts[std::int64_t{row} * per_token + j] = best.expert;
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

// Sum over the CTA, and of the threads before this one.
__device__ std::int32_t block_scan(std::int32_t value, std::int32_t& before) {
  __shared__ std::int32_t of_warp[kThreads / kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  std::int32_t inclusive = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const std::int32_t other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  __syncthreads();  // the sums of an earlier call were read
  if (lane == kWarp - 1) of_warp[warp] = inclusive;
  __syncthreads();
  std::int32_t total = 0;
  before = inclusive - value;
#pragma unroll
  for (int i = 0; i < kThreads / kWarp; ++i) {
    if (i < warp) before += of_warp[i];
    total += of_warp[i];
  }
  return total;
}

// A CTA per expert. Each counts the pairs of the experts before its own, so none waits for another; a thread reads a
// run of pairs, so its own pairs stand in order.
__global__ void __launch_bounds__(kThreads)
    sort_kernel(const std::int32_t* experts, std::int32_t num_pairs, std::int32_t per_token, std::int32_t* token_of,
                std::int32_t* place_of, GroupTile* tiles) {
  const auto own = static_cast<std::int32_t>(blockIdx.x);
  const std::int32_t run = (num_pairs + kThreads - 1) / kThreads;
  const std::int32_t begin = min(num_pairs, static_cast<std::int32_t>(threadIdx.x) * run);
  const std::int32_t end = min(num_pairs, begin + run);
  std::int32_t lower = 0, equal = 0;
  for (std::int32_t i = begin; i < end; ++i) {
    const std::int32_t expert = experts[i];
    lower += expert < own ? 1 : 0;
    equal += expert == own ? 1 : 0;
  }
  std::int32_t before = 0;
  const std::int32_t first_row = block_scan(lower, before);
  const std::int32_t rows = block_scan(equal, before);
  std::int32_t place = first_row + before;
  for (std::int32_t i = begin; equal > 0 && i < end; ++i) {
    if (experts[i] != own) continue;
    token_of[place] = i / per_token;
    place_of[i] = place++;
  }
  const std::int32_t first_tile = first_row / kGroupTileRows + own;
  const std::int32_t end_tile = (first_row + rows) / kGroupTileRows + own + 1;
  for (std::int32_t t = first_tile + static_cast<std::int32_t>(threadIdx.x); t < end_tile; t += kThreads) {
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
  sort_kernel<<<static_cast<unsigned>(num_experts), kThreads, 0, stream>>>(experts, rows * per_token, per_token,
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
