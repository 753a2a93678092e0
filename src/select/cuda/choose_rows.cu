// Device side of the budgets: a CTA per mask row; before it, for a density, a cluster of CTAs per chunk, whose rows
// share one cut. Scores come from the second-level cache again at every pass of the search; a pass costs a barrier.
#include "src/core/launch_kernel.h"
#include "src/ptx/cluster.cuh"
#include "src/ptx/control.cuh"
#include "src/ptx/shared_address.cuh"
#include "src/select/cuda/choose.h"
#include "src/select/random_score.h"

namespace compact {
namespace {

constexpr std::int32_t kRowThreads = 256;
constexpr std::int32_t kChunkThreads = 512;
constexpr std::int32_t kClusterCtas = 8;  // what every device with clusters has
static_assert(3 * kClusterCtas <= 32, "a lane for each sum of each CTA");

// Sums of a CTA's warps. Two places in turn: a barrier orders a sum after the one before the last.
template <std::int32_t kWarps>
struct WarpSums {
  std::uint64_t sums[2][3][kWarps];
};

__device__ __forceinline__ std::uint64_t warp_sum(std::uint64_t x) {
#pragma unroll
  for (std::int32_t step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The threads of a CTA, for choose_rows.h.
class RowTeam {
 public:
  static constexpr std::int32_t kWarps = kRowThreads / 32;

  __device__ explicit RowTeam(WarpSums<kWarps>& shared) : shared_(shared) {}
  __device__ static std::int32_t index() { return static_cast<std::int32_t>(threadIdx.x); }
  __device__ static constexpr std::int32_t size() { return kRowThreads; }

  __device__ void sum(std::uint64_t (&x)[3]) {
    auto& sums = shared_.sums[turn_ ^= 1];
#pragma unroll
    for (std::int32_t i = 0; i < 3; ++i) {
      const std::uint64_t own = warp_sum(x[i]);
      if (index() % 32 == 0) sums[i][index() / 32] = own;
    }
    __syncthreads();
#pragma unroll
    for (std::int32_t i = 0; i < 3; ++i) {
      x[i] = 0;
      for (std::int32_t w = 0; w < kWarps; ++w) x[i] += sums[i][w];
    }
  }

  __device__ std::uint32_t largest(std::uint32_t x) {
    auto& sums = shared_.sums[turn_ ^= 1];
    x = __reduce_max_sync(0xffffffffu, x);
    if (index() % 32 == 0) sums[0][index() / 32] = x;
    __syncthreads();
    for (std::int32_t w = 0; w < kWarps; ++w) {
      const auto other = static_cast<std::uint32_t>(sums[0][w]);
      x = other > x ? other : x;
    }
    return x;
  }

  template <class Keep>
  __device__ static void put_bits(std::uint64_t* words, std::int32_t num_words, Keep keep) {
    auto* halves = reinterpret_cast<std::uint32_t*>(words);
    for (std::int32_t half = index() / 32; half < 2 * num_words; half += kWarps) {
      const std::uint32_t bits = __ballot_sync(0xffffffffu, keep(half * 32 + index() % 32));
      if (index() % 32 == 0) halves[half] = bits;
    }
  }

  __device__ static void add(std::uint64_t* p, std::int32_t x) {
    atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
  }

 private:
  WarpSums<kWarps>& shared_;
  std::int32_t turn_ = 0;
};

// The threads of a cluster.
class ChunkTeam {
 public:
  static constexpr std::int32_t kWarps = kChunkThreads / 32;
  struct Shared {
    WarpSums<kWarps> warps;
    std::uint64_t ctas[2][3];    // this CTA's
    std::uint64_t totals[2][3];  // the cluster's
  };

  __device__ explicit ChunkTeam(Shared& shared) : shared_(shared) {}
  __device__ static std::int32_t index() {
    return static_cast<std::int32_t>(ptx::cluster_rank()) * kChunkThreads + static_cast<std::int32_t>(threadIdx.x);
  }
  __device__ static std::int32_t size() { return static_cast<std::int32_t>(ptx::cluster_size()) * kChunkThreads; }
  __device__ static std::int32_t warp() { return index() / 32; }
  __device__ static std::int32_t num_warps() { return size() / 32; }
  __device__ static std::int32_t lane() { return index() % 32; }
  __device__ static constexpr std::int32_t lanes() { return 32; }

  __device__ void sum(std::uint64_t (&x)[3]) {
    turn_ ^= 1;
    auto& sums = shared_.warps.sums[turn_];
    const auto warp = static_cast<std::int32_t>(threadIdx.x) / 32, lane = static_cast<std::int32_t>(threadIdx.x) % 32;
#pragma unroll
    for (std::int32_t i = 0; i < 3; ++i) {
      const std::uint64_t own = warp_sum(x[i]);
      if (lane == 0) sums[i][warp] = own;
    }
    __syncthreads();
    if (warp < 3) {
      const std::uint64_t own = warp_sum(lane < kWarps ? sums[warp][lane] : 0);
      if (lane == 0) shared_.ctas[turn_][warp] = own;
    }
    ptx::cluster_sync();
    // One warp asks the other CTAs: requests of all warps would queue at their memory.
    if (warp == 0) {
      const std::int32_t sum = lane % 3;
      const auto ctas = static_cast<std::int32_t>(ptx::cluster_size());
      std::uint64_t part = 0;
      if (lane / 3 < ctas) {
        part = ptx::load_cluster_shared(ptx::shared_address(&shared_.ctas[turn_][sum]),
                                        static_cast<std::uint32_t>(lane / 3));
      }
      std::uint64_t total = 0;
#pragma unroll
      for (std::int32_t rank = 0; rank < kClusterCtas; ++rank) {
        total += __shfl_sync(0xffffffffu, part, rank * 3 + sum);
      }
      if (lane < 3) shared_.totals[turn_][lane] = total;
    }
    __syncthreads();
#pragma unroll
    for (std::int32_t i = 0; i < 3; ++i) x[i] = shared_.totals[turn_][i];
  }

 private:
  Shared& shared_;
  std::int32_t turn_ = 0;
};

__global__ void __launch_bounds__(kRowThreads) choose_rows_kernel(ChooseArgs args) {
  __shared__ WarpSums<RowTeam::kWarps> shared;
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  RowTeam team(shared);
  const auto row = static_cast<std::int32_t>(blockIdx.x);
  choose_row(team, args, row / args.rows.max_blocks, row % args.rows.max_blocks);
}

__global__ void __launch_bounds__(kChunkThreads, 1) cut_chunks_kernel(ChooseArgs args) {
  __shared__ ChunkTeam::Shared shared;
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  ChunkTeam team(shared);
  cut_chunk(team, args, static_cast<std::int32_t>(blockIdx.x / ptx::cluster_size()));
  ptx::cluster_sync();  // no CTA leaves while another reads its sums
}

__global__ void __launch_bounds__(kRowThreads) random_scores_kernel(RandomScoreArgs args) {
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const auto row = static_cast<std::int32_t>(blockIdx.x);
  const std::int32_t block_idx = row % args.rows.max_blocks;
  if (block_idx >= args.tables.header->num_blocks) return;
  const StepChunk chunk = args.tables.chunks[args.tables.blocks[block_idx].chunk];
  const RandomScore score(args.seed, args.layer, row / args.rows.max_blocks);
  float* scores = args.rows.scores + row * args.rows.row_stride;
  for (auto j = static_cast<std::int32_t>(threadIdx.x); j < chunk.chunk_start / args.page_tokens; j += kRowThreads) {
    scores[j] = score(j);
  }
  if (threadIdx.x == 0) args.rows.nonfinite[row] = 0;
}

}  // namespace

cudaError_t launch_random_scores(const RandomScoreArgs& args, bool pdl, cudaStream_t stream) {
  return launch_kernel(random_scores_kernel, args.rows.mask_heads * args.rows.max_blocks, kRowThreads, 0, pdl, stream,
                       args);
}

cudaError_t launch_choose_rows(const ChooseArgs& args, std::int32_t num_chunks, bool pdl, cudaStream_t stream) {
  if (args.rule.kind == BudgetKind::kDensity && !keeps_all(args.rule, args.rule.value)) {
    const std::int32_t cluster = pdl ? kClusterCtas : 1;  // both from 9.0 on
    const cudaError_t error =
        launch_kernel(cut_chunks_kernel, num_chunks * cluster, kChunkThreads, 0, pdl, stream, args, cluster);
    if (error != cudaSuccess) return error;
  }
  return launch_kernel(choose_rows_kernel, args.rows.mask_heads * args.rows.max_blocks, kRowThreads, 0, pdl, stream,
                       args);
}

}  // namespace compact
