// Host launch functions of the rope table and of the append. `stream` is a cudaStream_t; the result is a cudaError_t.
#pragma once

#include <cuda_runtime_api.h>

#include "compact/append_cuda.h"

namespace compact {

struct RopeTableArgs {
  const CudaChunk* chunks = nullptr;  // [num_chunks]
  std::int32_t num_chunks = 0;
  std::int32_t num_q_tokens = 0;               // T
  std::int32_t half_dim = 0;                   // D/2
  const float* inverse_frequencies = nullptr;  // [D/2]
  float2* table = nullptr;                     // [T, D/2]
};
cudaError_t launch_rope_table(const RopeTableArgs& args, bool pdl, cudaStream_t stream);

struct AppendArgs {
  const CudaChunk* chunks = nullptr;  // [num_chunks]
  const std::int32_t* page_tables = nullptr;
  std::int64_t page_table_stride = 0;
  std::int32_t num_table_rows = 0;
  std::int32_t num_chunks = 0;
  std::int32_t num_q_tokens = 0;  // T
  std::int32_t max_context_tokens = 0;
  std::int32_t num_q_heads = 0;  // 0: no queries
  CudaAppendInput in;
  PagedKvView kv;
  std::uint16_t* mean_k = nullptr;
  std::int32_t* mean_tokens = nullptr;
  std::int32_t max_pages = 0;  // pages that the chunks touch at most
};
cudaError_t launch_append(const AppendArgs& args, bool pdl, cudaStream_t stream);

}  // namespace compact
