// Records below pages for the tokens of a step's chunks: means of the granules that they complete and norms of their
// keys, in the order of docs/design/method.md 2.2. A CTA per (chunk, granule that it touches). A mean takes a thread
// per two channels of a head, tokens in order; a norm 16 lanes, lane i the channels i, i + 16, ..., then a tree,
// products rounded before they are added: the bits of src/kv/page_summary.cc.
#include "src/core/launch_kernel.h"
#include "src/ptx/control.cuh"
#include "src/ptx/convert.cuh"
#include "src/ptx/unpack.cuh"
#include "src/select/cuda/launch.h"

namespace compact {
namespace {

constexpr std::int32_t kThreads = 256;
constexpr std::int32_t kNormLanes = 16;

// Granules that a chunk of T tokens can touch.
std::int32_t most_granules(const PageSummariesArgs& args) {
  return num_runs(0, args.num_q_tokens, granule_tokens(args.kv.page_tokens)) + 1;
}

template <ptx::MmaType kType>
__global__ void __launch_bounds__(kThreads, 2) page_summaries_kernel(PageSummariesArgs args) {
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const PagedKvView& kv = args.kv;
  const std::int32_t w = granule_tokens(kv.page_tokens);
  const auto per_chunk = static_cast<std::int32_t>(gridDim.x) / args.num_chunks;
  const CudaChunk chunk = args.chunks[static_cast<std::int32_t>(blockIdx.x) / per_chunk];
  if (chunk.chunk_tokens <= 0 || chunk.chunk_tokens > args.num_q_tokens || chunk.chunk_start < 0 ||
      chunk.table_row < 0 || chunk.table_row >= args.num_table_rows) {
    return;
  }
  const std::int32_t granule = chunk.chunk_start / w + static_cast<std::int32_t>(blockIdx.x) % per_chunk;
  const std::int32_t granule_begin = granule * w;
  const std::int32_t context = chunk.chunk_start + chunk.chunk_tokens;
  const std::int32_t logical = granule_begin / kv.page_tokens;
  if (granule_begin >= context || logical >= args.max_pages) return;
  const std::int32_t page = args.page_tables[chunk.table_row * args.page_table_stride + logical];
  if (page < 0 || page >= kv.num_pages) return;
  const std::int32_t first = granule_begin % kv.page_tokens;  // token of the page
  const auto* const keys = static_cast<const std::uint16_t*>(kv.k) + page * kv.page_stride;
  const auto thread = static_cast<std::int32_t>(threadIdx.x);

  if (args.sub_mean_k != nullptr && granule_begin + w <= context) {
    const std::int32_t pairs = kv.head_dim / 2, granules = kv.page_tokens / w;
    for (std::int32_t i = thread; i < kv.num_kv_heads * pairs; i += kThreads) {
      const std::int32_t head = i / pairs;
      const std::uint16_t* from = keys + head * kv.head_stride + i % pairs * 2;
      float2 sum{};
#pragma unroll 8
      for (std::int32_t t = first; t < first + w; ++t) {
        const float2 x = ptx::unpack_pair<kType>(*reinterpret_cast<const std::uint32_t*>(from + t * kv.token_stride));
        sum.x += x.x;
        sum.y += x.y;
      }
      const auto count = static_cast<float>(w);
      const std::int64_t record = (std::int64_t{page} * kv.num_kv_heads + head) * granules + first / w;
      reinterpret_cast<std::uint32_t*>(args.sub_mean_k)[record * pairs + i % pairs] =
          ptx::pack_pair<kType>(__fdiv_rn(sum.x, count), __fdiv_rn(sum.y, count));
    }
  }

  if (args.norm_k == nullptr) return;
  const std::int32_t begin = chunk.chunk_start > granule_begin ? chunk.chunk_start - granule_begin : 0;
  const std::int32_t end = context - granule_begin < w ? context - granule_begin : w;
  const std::int32_t lane = thread % kNormLanes;
  const std::int32_t rows = (end - begin) * kv.num_kv_heads;
  for (std::int32_t row0 = 0; row0 < rows; row0 += kThreads / kNormLanes) {
    const std::int32_t row = row0 + thread / kNormLanes;
    const bool there = row < rows;
    const std::int32_t token = first + begin + (there ? row / kv.num_kv_heads : 0);
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
      args.norm_k[(std::int64_t{page} * kv.num_kv_heads + head) * kv.page_tokens + token] = __fsqrt_rn(sum);
    }
  }
}

}  // namespace

cudaError_t launch_page_summaries(const PageSummariesArgs& args, bool pdl, cudaStream_t stream) {
  const auto kernel = args.kv.dtype == DType::kF16 ? page_summaries_kernel<ptx::MmaType::kF16>
                                                   : page_summaries_kernel<ptx::MmaType::kBf16>;
  return launch_kernel(kernel, args.num_chunks * most_granules(args), kThreads, 0, pdl, stream, args);
}

}  // namespace compact
