// Device side of the plan of a step and of the union: a CTA per chunk, and a CTA per (chunk, sub-group of heads). Both
// are bound by the latency of a few dependent reads, not by their work.
#include "src/core/launch_kernel.h"
#include "src/ptx/control.cuh"
#include "src/unite/cuda/launch.h"

namespace compact {
namespace {

// The threads of a CTA, for plan_step.h and unite_tree.h.
template <std::int32_t kThreads>
class Cta {
 public:
  __device__ explicit Cta(std::int64_t (&warp_sums)[kThreads / 32], void* near = nullptr, std::int64_t near_bytes = 0)
      : warp_sums_(warp_sums), near_(near), near_bytes_(near_bytes) {}

  __device__ static std::int32_t index() { return static_cast<std::int32_t>(threadIdx.x); }
  __device__ static constexpr std::int32_t size() { return kThreads; }
  __device__ static std::int32_t warp() { return index() / 32; }
  __device__ static constexpr std::int32_t num_warps() { return kThreads / 32; }
  __device__ static std::int32_t lane() { return index() % 32; }
  __device__ static constexpr std::int32_t lanes() { return 32; }
  __device__ static void sync() { __syncthreads(); }
  __device__ static void report(std::int32_t* error, std::int32_t code) { atomicCAS(error, 0, code); }
  __device__ static void or_into(std::uint64_t* p, std::uint64_t x) {
    atomicOr(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
  }
  __device__ static void add_into(std::int64_t* p, std::int64_t x) {
    atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
  }
  __device__ void* near_memory(std::int64_t bytes) const { return bytes <= near_bytes_ ? near_ : nullptr; }

  __device__ static std::int64_t warp_sum(std::int64_t x) {
    for (std::int32_t step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
  __device__ std::int64_t sum(std::int64_t x) {
    x = warp_sum(x);
    if (lane() == 0) warp_sums_[warp()] = x;
    __syncthreads();
    std::int64_t total = 0;
    for (std::int32_t w = 0; w < num_warps(); ++w) total += warp_sums_[w];
    __syncthreads();
    return total;
  }

 private:
  std::int64_t (&warp_sums_)[kThreads / 32];
  void* near_;
  std::int64_t near_bytes_;
};

constexpr std::int32_t kPlanThreads = 512;
constexpr std::int32_t kUniteThreads = 512;
constexpr std::int32_t kUniteNearBytes = 32768;  // a chunk of 1024 in tiles, a context of 256K in pages of 128: 21 KB

__global__ void __launch_bounds__(kPlanThreads, 1) plan_step_kernel(PlanArgs args) {
  __shared__ std::int64_t warp_sums[kPlanThreads / 32];
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  Cta<kPlanThreads> cta(warp_sums);
  plan_chunk(cta, args, static_cast<std::int32_t>(blockIdx.x));
}

__global__ void __launch_bounds__(kUniteThreads, 1) unite_kernel(UniteArgs args) {
  __shared__ std::int64_t warp_sums[kUniteThreads / 32];
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  __shared__ __align__(8) unsigned char near[kUniteNearBytes];
  Cta<kUniteThreads> cta(warp_sums, near, kUniteNearBytes);
  UniteTree(args, static_cast<std::int32_t>(blockIdx.x), cta).run(cta);
}

}  // namespace

cudaError_t launch_plan_step(const PlanArgs& args, std::int32_t ctas, bool pdl, cudaStream_t stream) {
  return launch_kernel(plan_step_kernel, ctas, kPlanThreads, 0, pdl, stream, args);
}

cudaError_t launch_unite(const UniteArgs& args, std::int32_t trees, bool pdl, cudaStream_t stream) {
  return launch_kernel(unite_kernel, trees, kUniteThreads, 0, pdl, stream, args);
}

}  // namespace compact
