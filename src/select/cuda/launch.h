// Host launch functions of page means, page summaries and mean-key selection. `stream` is a cudaStream_t; the result is
// a cudaError_t.
#pragma once

#include <cuda_runtime_api.h>

#include "src/select/cuda/step_tables.h"

namespace compact {

struct PageMeansArgs {
  PagedKvView kv;
  const CudaChunk* chunks = nullptr;  // [num_chunks]
  const std::int32_t* page_tables = nullptr;
  std::int64_t page_table_stride = 0;
  std::int32_t num_chunks = 0;
  std::int32_t num_table_rows = 0;
  std::int32_t max_pages = 0;           // of a chunk's context
  std::uint16_t* mean_k = nullptr;      // [num_pages, Hkv, D]
  std::int32_t* mean_tokens = nullptr;  // [num_pages] or null
};
cudaError_t launch_page_means(const PageMeansArgs& args, bool pdl, cudaStream_t stream);

struct PageSummariesArgs {
  PagedKvView kv;
  const CudaChunk* chunks = nullptr;  // [num_chunks]
  const std::int32_t* page_tables = nullptr;
  std::int64_t page_table_stride = 0;
  std::int32_t num_chunks = 0;
  std::int32_t num_table_rows = 0;
  std::int32_t num_q_tokens = 0;
  std::int32_t max_pages = 0;           // of a chunk's context
  std::uint16_t* sub_mean_k = nullptr;  // [num_pages, Hkv, P/w, D] or null
  float* norm_k = nullptr;              // [num_pages, Hkv, P] or null
  float* gate_pool = nullptr;           // [num_pages, Hkv, P/64, 3, D]
  float* gate_sum = nullptr;            // [num_pages, Hkv, P/64, D]
};
cudaError_t launch_page_summaries(const PageSummariesArgs& args, bool pdl, cudaStream_t stream);  // means and norms
cudaError_t launch_gate_pools(const PageSummariesArgs& args, bool pdl, cudaStream_t stream);

struct MeanKeyArgs {
  StepTables tables;
  const std::int32_t* page_tables = nullptr;
  std::int64_t page_table_stride = 0;
  const std::int32_t* mean_tokens = nullptr;  // [num_pages] or null
  const std::uint16_t* q = nullptr;           // [T, Hq, D]
  std::int64_t q_token_stride = 0;
  std::int64_t q_head_stride = 0;
  const std::uint16_t* mean_k = nullptr;  // [num_pages, Hkv, D]
  DType dtype = DType::kBF16;
  std::int32_t head_dim = 0;
  std::int32_t num_kv_heads = 0;
  std::int32_t group = 1;
  std::int32_t page_tokens = 0;
  std::int32_t max_blocks = 0;
  std::int32_t max_pairs = 0;
  std::int32_t words_per_row = 0;
  float scale_log2 = 0;  // softmax scale * log2(e)
  float inverse_scale = 0;
  float share = 0;
  const float* head_shares = nullptr;  // [Hkv] in place of share, or null
  float lift = 0;
  std::uint64_t* mask = nullptr;                 // [Hkv, max_blocks, words_per_row]
  unsigned long long* nonfinite_rows = nullptr;  // [1] or null
};
cudaError_t launch_mean_key_sm80(const MeanKeyArgs& args, bool pdl, cudaStream_t stream);
cudaError_t launch_mean_key_sm90(const MeanKeyArgs& args, cudaStream_t stream);

}  // namespace compact
