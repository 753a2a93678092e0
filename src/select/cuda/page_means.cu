// Means of the complete pages of a step's requests, in the order of docs/design/method.md 2.2: fp32 sums of granules
// of 32 tokens, granules in ascending order, division by the count. A CTA per (chunk, logical page); a thread owns two
// channels of one head, so a warp reads 128 bytes of a token.
#include <cuda_bf16.h>

#include "src/core/launch_kernel.h"
#include "src/ptx/control.cuh"
#include "src/ptx/convert.cuh"
#include "src/ptx/unpack.cuh"
#include "src/select/cuda/launch.h"

namespace compact {
namespace {

constexpr std::int32_t kThreads = 256;

template <ptx::MmaType kType>
__global__ void __launch_bounds__(kThreads, 2) page_means_kernel(PageMeansArgs args) {
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const PagedKvView& kv = args.kv;
  const std::int32_t logical = static_cast<std::int32_t>(blockIdx.x) % args.max_pages;
  const CudaChunk chunk = args.chunks[static_cast<std::int32_t>(blockIdx.x) / args.max_pages];
  if (chunk.chunk_tokens <= 0 || chunk.table_row < 0 || chunk.table_row >= args.num_table_rows) return;
  if (logical >= (chunk.chunk_start + chunk.chunk_tokens) / kv.page_tokens) return;
  const std::int32_t page = args.page_tables[chunk.table_row * args.page_table_stride + logical];
  if (page < 0 || page >= kv.num_pages) return;
  const std::int32_t granule = granule_tokens(kv.page_tokens);
  const std::int32_t pairs = kv.head_dim / 2;
  for (std::int32_t i = static_cast<std::int32_t>(threadIdx.x); i < kv.num_kv_heads * pairs; i += kThreads) {
    const std::int32_t head = i / pairs;
    const auto* from =
        static_cast<const std::uint16_t*>(kv.k) + page * kv.page_stride + head * kv.head_stride + i % pairs * 2;
    float2 total{};
    for (std::int32_t first = 0; first < kv.page_tokens; first += granule) {
      float2 sum{};
#pragma unroll 8
      for (std::int32_t t = first; t < first + granule; ++t) {
        const float2 x = ptx::unpack_pair<kType>(*reinterpret_cast<const std::uint32_t*>(from + t * kv.token_stride));
        sum.x += x.x;
        sum.y += x.y;
      }
      total = first == 0 ? sum : float2{total.x + sum.x, total.y + sum.y};
    }
    const auto count = static_cast<float>(kv.page_tokens);
    reinterpret_cast<std::uint32_t*>(args.mean_k)[(std::int64_t{page} * kv.num_kv_heads + head) * pairs + i % pairs] =
        ptx::pack_pair<kType>(__fdiv_rn(total.x, count), __fdiv_rn(total.y, count));
  }
  if (threadIdx.x == 0 && args.mean_tokens != nullptr) args.mean_tokens[page] = kv.page_tokens;
}

}  // namespace

cudaError_t launch_page_means(const PageMeansArgs& args, bool pdl, cudaStream_t stream) {
  const auto kernel =
      args.kv.dtype == DType::kF16 ? page_means_kernel<ptx::MmaType::kF16> : page_means_kernel<ptx::MmaType::kBf16>;
  return launch_kernel(kernel, args.num_chunks * args.max_pages, kThreads, 0, pdl, stream, args);
}

}  // namespace compact
