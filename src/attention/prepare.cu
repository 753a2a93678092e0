// Device side of the plan: one CTA. A batch of 1-2 thousand units takes a few microseconds, which the main kernel's
// launch hides in part; the next kernel of the stream may become resident as soon as this one runs.
#include "src/attention/cuda/launch.h"
#include "src/core/launch_kernel.h"
#include "src/ptx/control.cuh"

namespace compact {
namespace {

constexpr std::int32_t kThreads = 512;  // more make every barrier dearer than they save
constexpr std::int32_t kWarps = kThreads / 32;
constexpr std::int32_t kUnitsInShared = 2048;  // binary searches over units stay out of L2 up to here

struct PrepareShared {
  std::int32_t class_count[kNumLengthClasses * kWarps];  // [class][warp]
  std::int32_t m_begin[kUnitsInShared + 1];
  std::int32_t step_begin[kUnitsInShared + 1];
  std::uint32_t warp_sum[2][kWarps];  // in turn, so that a scan needs one barrier
  std::int64_t warp_total[kWarps];
};
static_assert(sizeof(PrepareShared) <= 48 * 1024, "static shared memory");

// Scans add counts in 32 bits and stop at 2^30, more than any bound that they are compared with.
constexpr std::uint32_t kSaturated = 1u << 30;

__device__ std::uint32_t saturating_add(std::uint32_t a, std::uint32_t b) { return min(a + b, kSaturated); }

__device__ std::uint32_t inclusive_in_warp(std::uint32_t value, std::int32_t lane) {
#pragma unroll
  for (std::int32_t step = 1; step < 32; step *= 2) {
    const std::uint32_t other = __shfl_up_sync(0xffffffffu, value, step);
    if (lane >= step) value = saturating_add(value, other);
  }
  return value;
}

struct CtaScan {
  std::uint32_t before;  // over the threads before this one
  std::uint32_t total;
};

__device__ __noinline__ CtaScan cta_scan(std::uint32_t (&warp_sum)[kWarps], std::uint32_t mine) {
  const std::int32_t warp = static_cast<std::int32_t>(threadIdx.x) / 32;
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x) % 32;
  const std::uint32_t inclusive = inclusive_in_warp(mine, lane);
  if (lane == 31) warp_sum[warp] = inclusive;
  __syncthreads();
  const std::uint32_t up_to = inclusive_in_warp(lane < kWarps ? warp_sum[lane] : 0, lane);
  const std::uint32_t before_warp = __shfl_sync(0xffffffffu, up_to, max(warp - 1, 0));
  const std::uint32_t before_lane = __shfl_up_sync(0xffffffffu, inclusive, 1);
  return {saturating_add(warp > 0 ? before_warp : 0, lane > 0 ? before_lane : 0),
          __shfl_sync(0xffffffffu, up_to, kWarps - 1)};
}

// The parallel parts of prepare.h for one CTA.
class CtaBlock {
 public:
  __device__ explicit CtaBlock(PrepareShared& shared) : shared_(shared) {}

  __device__ std::int32_t index() const { return static_cast<std::int32_t>(threadIdx.x); }
  __device__ void report(std::int32_t* error, std::int32_t code) const {
    if (error != nullptr) atomicCAS(error, 0, code);
  }

  template <class F>
  __device__ void for_each(std::int32_t n, F f) {
    CA_DEVICE_NO_UNROLL
    for (std::int32_t i = index(); i < n; i += kThreads) f(i);
    __syncthreads();
  }

  template <class F>
  __device__ std::int64_t sum(std::int32_t n, F f) {
    std::int64_t mine = 0;
    CA_DEVICE_NO_UNROLL
    for (std::int32_t i = index(); i < n; i += kThreads) mine += f(i);
#pragma unroll
    for (std::int32_t step = 16; step > 0; step /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, step);
    if (index() % 32 == 0) shared_.warp_total[index() / 32] = mine;
    __syncthreads();
    std::int64_t total = shared_.warp_total[index() % kWarps];
#pragma unroll
    for (std::int32_t step = kWarps / 2; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    __syncthreads();  // the next sum writes warp_total
    return total;
  }

  template <class F>
  __device__ std::int64_t scan(std::int32_t* a, std::int32_t n, F f) {
    const std::int32_t per_thread = ceil_div(n, kThreads);
    const std::int32_t begin = min_i32(n, index() * per_thread);
    const std::int32_t end = min_i32(n, begin + per_thread);
    std::uint32_t mine = 0;
    CA_DEVICE_NO_UNROLL
    for (std::int32_t i = begin; i < end; ++i) {
      a[i] = f(i);
      mine = saturating_add(mine, min(static_cast<std::uint32_t>(a[i]), kSaturated));
    }
    const CtaScan sums = cta_scan(shared_.warp_sum[turn_], mine);
    turn_ ^= 1;
    std::uint32_t before = sums.before;
    CA_DEVICE_NO_UNROLL
    for (std::int32_t i = begin; i < end; ++i) {
      const std::uint32_t value = min(static_cast<std::uint32_t>(a[i]), kSaturated);
      a[i] = static_cast<std::int32_t>(before);
      before = saturating_add(before, value);
    }
    __syncthreads();
    return sums.total;
  }

  // Counting sort. Each warp owns a contiguous run of elements, so (class, warp, place in the run) is a stable order.
  template <class Key, class Emit>
  __device__ std::int32_t stable_sort(std::int32_t n, Key key, Emit emit) {
    CA_DEVICE_NO_UNROLL
    for (std::int32_t i = index(); i < kNumLengthClasses * kWarps; i += kThreads) shared_.class_count[i] = 0;
    __syncthreads();
    walk_run(n, key, [](std::int32_t, std::int32_t) {});
    __syncthreads();
    const auto total = static_cast<std::int32_t>(
        scan(shared_.class_count, kNumLengthClasses * kWarps, [&](std::int32_t i) { return shared_.class_count[i]; }));
    walk_run(n, key, emit);
    __syncthreads();
    return total;
  }

 private:
  // Visits this warp's run in order, 32 elements at a time, and advances its counter of each class; `visit` gets the
  // counter's value for every element.
  template <class Key, class Visit>
  __device__ void walk_run(std::int32_t n, Key key, Visit visit) {
    const std::int32_t warp = index() / 32;
    const std::int32_t lane = index() % 32;
    const std::int32_t run = ceil_div(ceil_div(n, kWarps), 32) * 32;
    const std::int64_t begin = std::int64_t{warp} * run;
    const std::int64_t end = begin + run < n ? begin + run : n;
    CA_DEVICE_NO_UNROLL
    for (std::int64_t base = begin; base < end; base += 32) {
      const auto i = static_cast<std::int32_t>(base + lane);
      const std::int32_t k = base + lane < end ? key(i) : -1;
      const unsigned peers = __match_any_sync(0xffffffffu, k);
      std::int32_t* counter = &shared_.class_count[(k < 0 ? 0 : k) * kWarps + warp];
      const std::int32_t first = *counter;
      __syncwarp();
      if (k >= 0 && lane == __ffs(static_cast<int>(peers)) - 1) *counter = first + __popc(peers);
      __syncwarp();
      if (k >= 0) visit(i, first + __popc(peers & ((1u << lane) - 1)));
    }
  }

  PrepareShared& shared_;
  std::int32_t turn_ = 0;
};

__global__ void __launch_bounds__(kThreads, 1) prepare_kernel(PrepareArgs args) {
  __shared__ PrepareShared shared;
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  if (args.max_units <= kUnitsInShared) {
    args.m_begin = shared.m_begin;
    args.step_begin = shared.step_begin;
  }
  CtaBlock block(shared);
  prepare_work(block, args);
}

__global__ void check_lists_kernel(CheckArgs args) {
  ptx::griddep_wait();
  const std::int32_t num_units = args.num_units == nullptr ? args.max_units : min(*args.num_units, args.max_units);
  const std::int32_t group = args.num_q_heads / args.num_kv_heads;
  for (std::int32_t u = static_cast<std::int32_t>(blockIdx.x); u < num_units;
       u += static_cast<std::int32_t>(gridDim.x)) {
    const AttentionUnit unit = args.units[u];
    const bool good = unit.q_len >= 0 && unit.q_begin >= 0 && unit.q_begin <= args.num_q_tokens - unit.q_len &&
                      unit.kv_head >= 0 && unit.kv_head < args.num_kv_heads && unit.q_head >= unit.kv_head * group &&
                      unit.q_head + args.heads_per_unit <= (unit.kv_head + 1) * group && unit.list_begin >= 0 &&
                      unit.list_tokens >= 0 && unit.past_tokens >= 0 && unit.past_tokens <= unit.list_tokens &&
                      unit.causal_shift >= 0;
    if (!good) {
      if (threadIdx.x == 0) atomicCAS(args.error, 0, static_cast<int>(CudaAttentionError::kBadUnit));
      continue;
    }
    const std::int32_t entries = ceil_div(unit.list_tokens, args.page_tokens);
    for (std::int32_t e = static_cast<std::int32_t>(threadIdx.x); e < entries;
         e += static_cast<std::int32_t>(blockDim.x)) {
      const std::int32_t page = args.page_ids[std::int64_t{unit.list_begin} + e];
      if (page < 0 || page >= args.num_pages)
        atomicCAS(args.error, 0, static_cast<int>(CudaAttentionError::kBadPageId));
    }
  }
}

}  // namespace

cudaError_t launch_prepare(const PrepareArgs& args, bool pdl, cudaStream_t stream) {
  return launch_kernel(prepare_kernel, 1, kThreads, 0, pdl, stream, args);
}

cudaError_t launch_check_lists(const CheckArgs& args, cudaStream_t stream) {
  return launch_kernel(check_lists_kernel, min_i32(args.max_units, 1024), 128, 0, false, stream, args);
}

}  // namespace compact
