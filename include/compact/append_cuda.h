/// Appending to a paged KV cache on an NVIDIA GPU: query and key norms, rotation, K and V into their pages, page means.
///
///   rope_table_cuda   once per step: cosine and sine of every row's position
///   append_cuda       per layer: q in place, K and V of the chunks into pages, means of the pages that they complete
///
/// The first calls of a step, before those of step_cuda.h: asynchronous on the caller's stream, without
/// synchronisation or allocation, fit for CUDA graphs. Method: docs/design/method.md section 2.
#pragma once

#include <cstdint>

#include "compact/status.h"
#include "compact/step_cuda.h"
#include "compact/tensor_view.h"

namespace compact {

/// Cosine and sine of inverse_frequency * position for every row of Q, the angle rounded to fp32 as transformers does.
///
/// inverse_frequencies  [D/2] on the device (rope_inverse_frequencies of the engine, or any other)
/// table                [T, D/2, 2] cosine, sine; 0, 0 for rows of no chunk
/// Reads of `input`: chunks, num_chunks, num_q_tokens. Errors: kInvalidArgument, kUnsupported (build without CUDA),
/// kCudaError.
[[nodiscard]] Status rope_table_cuda(const CudaStepInput& input, const float* inverse_frequencies,
                                     std::int32_t head_dim, float* table, void* stream);

/// Device pointers; q, k and v have the cache's type. They may be parts of one tensor (a fused projection): only
/// strides matter. Base addresses are multiples of 16 bytes, strides multiples of 8 elements.
struct CudaAppendInput {
  void* q = nullptr;  // [T, Hq, D] normed and rotated in place; null: only K and V
  std::int64_t q_token_stride = 0;
  std::int64_t q_head_stride = 0;
  const void* k = nullptr;  // [T, Hkv, D]
  std::int64_t k_token_stride = 0;
  std::int64_t k_head_stride = 0;
  const void* v = nullptr;  // [T, Hkv, D]
  std::int64_t v_token_stride = 0;
  std::int64_t v_head_stride = 0;
  /// Of rope_table_cuda: dimensions (d, d + D/2) of q and k are turned. Null: they are rotated already.
  const float* rope_table = nullptr;
  /// [D] each or null: every head of q and k is divided by its root mean square and multiplied with this, before the
  /// rotation (Qwen3).
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  float norm_eps = 0;
};

/// Writes K and V of every chunk at its positions [S, S + C), in place: other tokens are neither moved nor changed. A
/// page that a chunk completes gets its mean key, from the keys as stored and in the order of
/// docs/design/method.md 2.2: the bits of page_means_cuda. Of a page that began in an earlier step the earlier keys (at
/// most P - 1) are read back, which takes no running sums. A page that is touched and not complete counts 0 tokens: no
/// stale mean looks valid.
///
/// kv           one layer; kv.k and kv.v are written. D is 64, 128 or 256
/// mean_k       [num_pages, Hkv, D] of kv.dtype, or null: no means
/// mean_tokens  [num_pages] or null
///
/// Chunks must not share pages that they write. A chunk with a field out of range writes nothing (plan_step_cuda
/// reports it), nor does a page id outside the cache. Rows of q in no chunk are left alone when there is a rope_table.
/// Errors: kInvalidArgument, kUnsupported (dtype, head dimension, page size, build without CUDA), kCudaError.
[[nodiscard]] Status append_cuda(const CudaStepInput& input, const CudaAppendInput& append, const PagedKvView& kv,
                                 void* mean_k, std::int32_t* mean_tokens, void* stream);

}  // namespace compact
