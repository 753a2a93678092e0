/// Selectors on an NVIDIA GPU: the twins of those of selector.h, on queries, pages and summaries that lie there.
///
///   cuda_mask_shape      which rows a selector's mask has, for CudaStepInput
///   page_summaries_cuda  per layer, after the append: what selectors read beside the pages
///   select_cuda          per layer, after plan_step_cuda: Q, keys or summaries -> block mask
///
/// Same pages, formulas, budgets and thresholds per head as on the CPU; scores are sums of products of tensor cores in
/// another order, so that masks may differ where a score lies within rounding of its cut. From the same scores the
/// masks are equal bit for bit. Calls neither synchronise nor allocate device memory, and can be captured in a CUDA
/// graph.
#pragma once

#include <cstdint>

#include "compact/cuda_backend.h"
#include "compact/selector.h"
#include "compact/status.h"
#include "compact/step_cuda.h"
#include "compact/tensor_view.h"

namespace compact {

/// CudaStepInput::mask_heads and block_tokens of a selector.
struct CudaMaskShape {
  std::int32_t mask_heads = 0;
  std::int32_t block_tokens = 0;
};

/// Errors: those of make_selector; kUnsupported for what has no twin, by name: sub-mean with coherence or probe rows,
/// mean-key with tile norm, alpha or visibility kFirst.
[[nodiscard]] Result<CudaMaskShape> cuda_mask_shape(const SelectorOptions& options, std::int32_t num_q_heads,
                                                    std::int32_t num_kv_heads, std::int32_t page_tokens);

/// Records of one layer beside its pages, device pointers; null: not kept (SelectorNeeds::summaries says what is read).
struct CudaPageSummaries {
  void* mean_k = nullptr;      // [num_pages, Hkv, D] of kv.dtype: append_cuda or page_means_cuda writes them
  void* sub_mean_k = nullptr;  // [num_pages, Hkv, P/w, D] of kv.dtype; w = granule_tokens(P)
  float* norm_k = nullptr;     // [num_pages, Hkv, P]
  float* gate_pool = nullptr;  // [num_pages, Hkv, P/64, 3, D]  maximum, minimum, mean: gate_pools_cuda
  float* gate_sum = nullptr;   // [num_pages, Hkv, P/64, D]  running sums, for gate_pools_cuda alone
};

/// Weights of SeerAttention's gates for one layer (GateWeights), device pointers.
struct CudaGates {
  const float* key = nullptr;                  // [key_heads, 3 D, D]
  const float* query = nullptr;                // [mask_heads, D or G D, D], or null as GateWeights::query
  const float* inverse_frequencies = nullptr;  // [D/2]
};

/// The granules that the chunks complete, and the norms of their keys, from the keys as stored and in the order of
/// docs/design/method.md 2.2: the bits of the cache's records, means rounded to kv.dtype. Granules of earlier chunks
/// stay as they are. kv: one layer, the chunks' keys appended. mean_k is not written. Errors: kInvalidArgument,
/// kUnsupported (dtype, page size, build without CUDA), kCudaError. Chunks out of bounds and page ids outside the cache
/// are skipped.
[[nodiscard]] Status page_summaries_cuda(const CudaStepInput& input, const PagedKvView& kv,
                                         const CudaPageSummaries& summaries, void* stream);

/// Pools of the chunks' tokens for `seer`: the bits of the cache's records. kv: one layer, whose pages hold the chunks'
/// keys *before* RoPE at their places (append_cuda without a rope_table); earlier tokens are not read, so that an
/// append with RoPE may follow. Writes gate_pool and gate_sum. P is a multiple of 64. Errors: as page_summaries_cuda.
[[nodiscard]] Status gate_pools_cuda(const CudaStepInput& input, const PagedKvView& kv,
                                     const CudaPageSummaries& summaries, void* stream);

/// One layer's selection. All pointers but `options` are device pointers.
struct CudaSelectInput {
  const SelectorOptions* options = nullptr;  // on the host; null: all defaults, mean-key
  const void* q = nullptr;                   // [T, Hq, D]  post-RoPE, 16 bit
  std::int64_t q_token_stride = 0;
  std::int64_t q_head_stride = 0;
  DType dtype = DType::kBF16;  // of q, keys and means: kBF16 or kF16
  std::int32_t head_dim = 0;   // D: 64, 128, 256
  float softmax_scale = 0;     // s, above 0
  PagedKvView kv;              // of the layer, the chunk's keys included; for selectors that read keys
  CudaPageSummaries summaries;
  const void* q_pre = nullptr;  // [T, Hq, D]  before RoPE, of `seer`, whose scores read this and not q
  std::int64_t q_pre_token_stride = 0;
  std::int64_t q_pre_head_stride = 0;
  CudaGates gates;         // of `seer`; shapes are those of options->seer.gates
  std::int32_t layer = 0;  // of `random`
  /// [mask_heads] or null: thresholds per head (HeadThresholds) of this layer. Not null where options->thresholds has
  /// any, whose values are not read.
  const float* head_thresholds = nullptr;
  /// Of `external`, form kWords: [mask_heads, max_blocks, words_per_row], shapes as the step says. Bits at or above Np
  /// are ignored. The mask's shape is the caller's to choose.
  const std::uint64_t* words = nullptr;
  CudaBackend backend = CudaBackend::kAuto;  // of mean-key
};

/// Bytes of device memory, aligned to 256, that select_cuda needs beside the plan's: scores and their scratch. Reads no
/// device memory; pointers may be null. Errors: as select_cuda.
[[nodiscard]] Result<std::int64_t> select_cuda_bytes(const CudaStepInput& input, const CudaSelectInput& select);

/// Bit j of mask[mask_head, block] = past page j is wanted; bits >= Np are 0.
///
/// mask            [mask_heads, max_blocks, words_per_row]  rows of blocks that do not exist may hold anything
/// nonfinite_rows  [1] or null; query rows with NaN or +inf scores, or with -inf only, are added. Their rows of the
/// mask
///                 keep all pages
/// plan            of plan_step_cuda
/// Errors: kInvalidArgument (the field, the value seen, what is allowed; a mask of another shape than
/// cuda_mask_shape's), kUnsupported (as cuda_mask_shape; dtype, head dimension, device below 8.0), kCudaError.
[[nodiscard]] Status select_cuda(const CudaStepInput& input, const CudaSelectInput& select, std::uint64_t* mask,
                                 std::uint64_t* nonfinite_rows, void* plan, std::int64_t plan_bytes, void* workspace,
                                 std::int64_t workspace_bytes, void* stream);

}  // namespace compact
