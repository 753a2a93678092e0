// Records below pages for the tokens of a step's chunks, in the order of docs/design/method.md 2.2: the bits of
// src/kv/page_summary.cc. A CTA per (chunk, run of tokens that it touches).
//
//   means   of granules that a chunk completes: a thread per two channels of a head, tokens in order
//   norms   of keys: 16 lanes, lane i the channels i, i + 16, ..., then a tree; products are rounded before they are
//   added pools   of blocks of 64 keys before RoPE: a thread per channel. Earlier tokens of an open block are not there
//   any
//           more: it goes on from its pools and a running sum
#include "src/core/launch_kernel.h"
#include "src/ptx/control.cuh"
#include "src/ptx/convert.cuh"
#include "src/ptx/unpack.cuh"
#include "src/select/cuda/launch.h"

namespace compact {
namespace {

constexpr std::int32_t kThreads = 256;
constexpr std::int32_t kNormLanes = 16;

// A run of positions that a chunk touches, inside one page.
struct TouchedRun {
  std::int32_t page = -1;    // -1: none
  std::int32_t first = 0;    // its first token in the page
  std::int32_t touched = 0;  // the chunk's tokens are [touched, end) of the run
  std::int32_t end = 0;
};

// Runs that a chunk of T tokens can touch.
std::int32_t most_runs(const PageSummariesArgs& args, std::int32_t length) {
  return num_runs(0, args.num_q_tokens, length) + 1;
}

__device__ __forceinline__ TouchedRun touched_run(const PageSummariesArgs& args, std::int32_t length) {
  const auto per_chunk = static_cast<std::int32_t>(gridDim.x) / args.num_chunks;
  const CudaChunk chunk = args.chunks[static_cast<std::int32_t>(blockIdx.x) / per_chunk];
  if (chunk.chunk_tokens <= 0 || chunk.chunk_tokens > args.num_q_tokens || chunk.chunk_start < 0 ||
      chunk.table_row < 0 || chunk.table_row >= args.num_table_rows) {
    return {};
  }
  const std::int32_t begin = (chunk.chunk_start / length + static_cast<std::int32_t>(blockIdx.x) % per_chunk) * length;
  const std::int32_t context = chunk.chunk_start + chunk.chunk_tokens;
  const std::int32_t logical = begin / args.kv.page_tokens;
  if (begin >= context || logical >= args.max_pages) return {};
  const std::int32_t page = args.page_tables[chunk.table_row * args.page_table_stride + logical];
  if (page < 0 || page >= args.kv.num_pages) return {};
  return {page, begin % args.kv.page_tokens, chunk.chunk_start > begin ? chunk.chunk_start - begin : 0,
          context - begin < length ? context - begin : length};
}

template <ptx::MmaType kType>
__global__ void __launch_bounds__(kThreads, 2) page_summaries_kernel(PageSummariesArgs args) {
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const PagedKvView& kv = args.kv;
  const std::int32_t w = granule_tokens(kv.page_tokens);
  const TouchedRun run = touched_run(args, w);
  if (run.page < 0) return;
  const auto* const keys = static_cast<const std::uint16_t*>(kv.k) + run.page * kv.page_stride;
  const auto thread = static_cast<std::int32_t>(threadIdx.x);

  if (args.sub_mean_k != nullptr && run.end == w) {
    const std::int32_t pairs = kv.head_dim / 2, granules = kv.page_tokens / w;
    for (std::int32_t i = thread; i < kv.num_kv_heads * pairs; i += kThreads) {
      const std::int32_t head = i / pairs;
      const std::uint16_t* from = keys + head * kv.head_stride + i % pairs * 2;
      float2 sum{};
#pragma unroll 8
      for (std::int32_t t = run.first; t < run.first + w; ++t) {
        const float2 x = ptx::unpack_pair<kType>(*reinterpret_cast<const std::uint32_t*>(from + t * kv.token_stride));
        sum.x += x.x;
        sum.y += x.y;
      }
      const auto count = static_cast<float>(w);
      const std::int64_t record = (std::int64_t{run.page} * kv.num_kv_heads + head) * granules + run.first / w;
      reinterpret_cast<std::uint32_t*>(args.sub_mean_k)[record * pairs + i % pairs] =
          ptx::pack_pair<kType>(__fdiv_rn(sum.x, count), __fdiv_rn(sum.y, count));
    }
  }

  if (args.norm_k == nullptr) return;
  const std::int32_t lane = thread % kNormLanes;
  const std::int32_t rows = (run.end - run.touched) * kv.num_kv_heads;
  for (std::int32_t row0 = 0; row0 < rows; row0 += kThreads / kNormLanes) {
    const std::int32_t row = row0 + thread / kNormLanes;
    const bool there = row < rows;
    const std::int32_t token = run.first + run.touched + (there ? row / kv.num_kv_heads : 0);
    const std::int32_t head = there ? row % kv.num_kv_heads : 0;
    const std::uint16_t* from = keys + head * kv.head_stride + token * kv.token_stride;
    float sum = 0;
    for (std::int32_t d = lane; d < kv.head_dim; d += kNormLanes) {
      const float x = ptx::unpack_pair<kType>(from[d]).x;
      sum = __fadd_rn(sum, __fmul_rn(x, x));
    }
#pragma unroll
    for (std::int32_t step = kNormLanes / 2; step > 0; step /= 2) {
      sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, step));
    }
    if (there && lane == 0) {
      args.norm_k[(std::int64_t{run.page} * kv.num_kv_heads + head) * kv.page_tokens + token] = __fsqrt_rn(sum);
    }
  }
}

template <ptx::MmaType kType>
__global__ void __launch_bounds__(kThreads, 2) gate_pools_kernel(PageSummariesArgs args) {
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const PagedKvView& kv = args.kv;
  const TouchedRun run = touched_run(args, kGateBlockTokens);
  if (run.page < 0) return;
  const std::int32_t dim = kv.head_dim, page_blocks = kv.page_tokens / kGateBlockTokens;
  for (auto i = static_cast<std::int32_t>(threadIdx.x); i < kv.num_kv_heads * dim; i += kThreads) {
    const std::int32_t head = i / dim, d = i % dim;
    const std::int64_t record =
        (std::int64_t{run.page} * kv.num_kv_heads + head) * page_blocks + run.first / kGateBlockTokens;
    float* const pool = args.gate_pool + record * 3 * dim + d;
    float* const open_sum = args.gate_sum + record * dim + d;
    const auto* from = static_cast<const std::uint16_t*>(kv.k) + run.page * kv.page_stride + head * kv.head_stride + d;
    const auto key = [&](std::int32_t t) { return ptx::unpack_pair<kType>(from[(run.first + t) * kv.token_stride]).x; };
    std::int32_t t = run.touched;
    float sum, largest, smallest;
    if (t == 0) {
      sum = largest = smallest = key(t++);
    } else {
      sum = *open_sum, largest = pool[0], smallest = pool[dim];
    }
    for (; t < run.end; ++t) {
      const float x = key(t);
      sum = __fadd_rn(sum, x);
      // A NaN stays: the comparison with it is false.
      largest = largest >= x ? largest : (largest == largest ? x : largest);
      smallest = smallest <= x ? smallest : (smallest == smallest ? x : smallest);
    }
    pool[0] = largest;
    pool[dim] = smallest;
    pool[2 * dim] = __fdiv_rn(sum, static_cast<float>(run.end));
    *open_sum = sum;
  }
}

}  // namespace

cudaError_t launch_page_summaries(const PageSummariesArgs& args, bool pdl, cudaStream_t stream) {
  const auto kernel = args.kv.dtype == DType::kF16 ? page_summaries_kernel<ptx::MmaType::kF16>
                                                   : page_summaries_kernel<ptx::MmaType::kBf16>;
  const std::int32_t runs = most_runs(args, granule_tokens(args.kv.page_tokens));
  return launch_kernel(kernel, args.num_chunks * runs, kThreads, 0, pdl, stream, args);
}

cudaError_t launch_gate_pools(const PageSummariesArgs& args, bool pdl, cudaStream_t stream) {
  const auto kernel =
      args.kv.dtype == DType::kF16 ? gate_pools_kernel<ptx::MmaType::kF16> : gate_pools_kernel<ptx::MmaType::kBf16>;
  return launch_kernel(kernel, args.num_chunks * most_runs(args, kGateBlockTokens), kThreads, 0, pdl, stream, args);
}

}  // namespace compact
