#include "tests/gpu/advance_chunks.h"

namespace compact::testing {
namespace {

__global__ void advance_chunks_kernel(CudaChunk* chunks, std::int32_t num_chunks) {
  const auto i = static_cast<std::int32_t>(threadIdx.x);
  if (i >= num_chunks) return;
  chunks[i].q_begin += chunks[i].chunk_tokens;
  chunks[i].chunk_start += chunks[i].chunk_tokens;
}

}  // namespace

cudaError_t advance_chunks(CudaChunk* chunks, std::int32_t num_chunks, cudaStream_t stream) {
  advance_chunks_kernel<<<1, 128, 0, stream>>>(chunks, num_chunks);
  return cudaGetLastError();
}

}  // namespace compact::testing
