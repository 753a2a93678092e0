/// Selection, union and page lists on an NVIDIA GPU: what attend_cuda (attention_cuda.h) reads, made without the host.
///
///   page_means_cuda            K pages -> mean keys (for pages that were written without their means)
///   plan_step_cuda             once per step: where every chunk's query blocks and spans lie; checks of page tables
///   select_mean_key_cuda       per layer: Q and mean keys -> block mask
///   build_page_lists_cuda      per layer: block mask -> attention units and page lists
///
/// Chunks, page tables and lengths lie on the device; the host gives sizes and bounds. Calls are asynchronous on the
/// caller's stream, neither synchronise nor allocate, and can be captured in a CUDA graph: replays follow what lies on
/// the device. Method: docs/design/method.md sections 2 to 5.
#pragma once

#include <cstdint>

#include "compact/attention.h"
#include "compact/attention_cuda.h"
#include "compact/attention_unit.h"
#include "compact/block_union.h"
#include "compact/cuda_backend.h"
#include "compact/selector.h"
#include "compact/status.h"
#include "compact/tensor_view.h"

namespace compact {

/// One request's part of a step, as the device sees it (ChunkView on the host).
struct CudaChunk {
  std::int32_t q_begin = 0;       // first row of the chunk in Q
  std::int32_t chunk_tokens = 0;  // C; 0 is allowed and does nothing
  std::int32_t chunk_start = 0;   // S, absolute position of the first query
  std::int32_t table_row = 0;     // row of page_tables
};
static_assert(sizeof(CudaChunk) == 16);

/// What may stand in `error` of plan_step_cuda. The chunk named wrong lists nothing: its units have q_len 0.
enum class CudaStepError : std::int32_t {
  kNone = 0,
  kBadChunk = 1,  ///< a field negative, rows past T, a table row that is not there, a context past max_context_tokens
  kTooManyRows = 2,  ///< chunks share rows of Q: more query blocks or spans than T rows can have
  kBadPageId = 3,    ///< a page table entry outside [0, num_pages)
  kStaleMean = 4,    ///< the mean of a past page does not cover P tokens
};
[[nodiscard]] const char* cuda_step_error_text(CudaStepError error) noexcept;

/// All pointers are device pointers.
struct CudaStepInput {
  const CudaChunk* chunks = nullptr;          // [num_chunks]
  const std::int32_t* page_tables = nullptr;  // [num_table_rows, page_table_stride]  physical page of each logical page
  const std::int32_t* mean_tokens = nullptr;  // [num_pages]  tokens that each mean covers; null: every complete page's
  std::int64_t page_table_stride = 0;         // entries between table rows
  std::int32_t num_table_rows = 0;
  std::int32_t num_chunks = 0;          // B
  std::int32_t num_q_tokens = 0;        // T, rows of Q
  std::int32_t max_context_tokens = 0;  // no chunk's L is larger
  std::int32_t num_q_heads = 0;         // Hq
  std::int32_t num_kv_heads = 0;        // Hkv
  std::int32_t page_tokens = 0;         // P, a power of two from 16 to 256
  std::int32_t num_pages = 0;           // physical pages
  /// Rows of the mask for each query block: Hq, or Hkv when the query heads of a KV head share theirs; 0: Hkv.
  std::int32_t mask_heads = 0;
  /// Bq: query tokens of a mask row, a power of two; 0: 128 packed rows within a page, as select_mean_key_cuda.
  std::int32_t block_tokens = 0;
  ForcedPages forced{};
  /// kCheapestHeads means G and is for masks of Hkv rows alone: there splitting could only cost more. list_dropped is
  /// not supported.
  UnionOptions options{};
  /// Whether lists give way to all pages where these would not be slower, by `crossover` and options.cost. Each (chunk,
  /// sub-group of heads) decides for itself, on the device; the CPU decides for a chunk (crossover_after_union).
  bool crosses_over = false;
  CrossoverPolicy crossover{};
};

/// What the caller allocates, from host numbers alone.
struct CudaStepSizes {
  std::int32_t block_tokens = 0;      // Bq: query tokens of a mask row
  std::int32_t max_blocks = 0;        // query blocks of the step at most
  std::int32_t words_per_row = 0;     // 64-bit words of a mask row
  std::int32_t heads_per_unit = 0;    // for CudaAttentionInput
  std::int32_t max_units = 0;         // units at most
  std::int32_t list_capacity = 0;     // page ids of a list at most; the list of unit u begins at u * list_capacity
  std::int32_t num_stats = 0;         // B * sub-groups of query heads
  std::int32_t mask_heads = 0;        // Hq or Hkv
  std::int64_t mask_words = 0;        // [mask_heads, max_blocks, words_per_row]
  std::int64_t num_list_entries = 0;  // max_units * list_capacity
  std::int64_t workspace_bytes = 0;   // aligned to 256
};
/// Errors: kInvalidArgument (the field, the value seen, what is allowed), kUnsupported (build without CUDA, page size,
/// more than 128 query heads to a KV head, list_dropped, kCheapestHeads with a row per query head).
[[nodiscard]] Result<CudaStepSizes> step_cuda_sizes(const CudaStepInput& input);

/// Plans the step into `workspace`, which the calls of all its layers read: keep it until the last of them. `error`:
/// [1] on the device, set to the first CudaStepError that is found; never reset. Errors: as step_cuda_sizes; null or
/// misaligned pointers; kCudaError.
[[nodiscard]] Status plan_step_cuda(const CudaStepInput& input, std::int32_t* error, void* workspace,
                                    std::int64_t workspace_bytes, void* stream);

/// Queries and mean keys of one layer, 16 bit each: scores are products of tensor cores with fp32 sums.
struct CudaMeanKeyInput {
  const void* q = nullptr;  // [T, Hq, D]  post-RoPE
  std::int64_t q_token_stride = 0;
  std::int64_t q_head_stride = 0;
  const void* mean_k = nullptr;  // [num_pages, Hkv, D]  of the same type
  DType dtype = DType::kBF16;    // kBF16 or kF16
  std::int32_t head_dim = 0;     // D: 64, 128, 256
  float softmax_scale = 0;       // s, above 0
  /// Only the default rule so far: packed tiles, visible kFull, kRow norm, kMax vote, a share (and lift); alpha < 0.
  MeanKeyOptions options{};
  const float* head_shares = nullptr;  // [Hkv] in place of options.share, on the device; or null
  /// The kernels sum in different orders: their masks may differ where a score meets its cut.
  CudaBackend backend = CudaBackend::kAuto;
};

/// The mean-key rule (selector.h). Bit j of mask[kv_head, block] = past page j is wanted; blocks are those of
/// make_query_blocks(chunks, block_tokens), in order, and bits >= Np are 0: BlockMask with room for max_blocks.
///
/// mask            [Hkv, max_blocks, words_per_row]  rows of blocks that do not exist are left alone
/// nonfinite_rows  [1] or null; rows with NaN or +inf scores, or with -inf only, are added. Their tiles keep all pages.
/// Errors: kInvalidArgument, kUnsupported (another rule, dtype, head dimension, backend, device below
/// 8.0), kCudaError.
[[nodiscard]] Status select_mean_key_cuda(const CudaStepInput& input, const CudaMeanKeyInput& select,
                                          std::uint64_t* mask, std::uint64_t* nonfinite_rows, void* workspace,
                                          std::int64_t workspace_bytes, void* stream);

struct CudaPageLists {
  AttentionUnit* units = nullptr;     // [max_units]  in the order of PageLists::units; after a merge (kAdaptive) the
                                      // places of the spans that are not the unit's first hold q_len 0
  std::int32_t* num_units = nullptr;  // [1]  places in use
  std::int32_t* page_ids = nullptr;   // [num_list_entries]
  UnionStats* stats = nullptr;        // [B, sub-groups]  sums of each chunk and sub-group
  DenseReason* reasons = nullptr;     // [B, sub-groups] or null; kNone: the lists of the mask
};

/// The page list of every unit: the same units, pages and order as build_page_lists from the same mask, each list in a
/// place of its own. Bits of the mask at or above Np are ignored. Where the crossover decides for all pages, the unit
/// is the whole chunk, in the place of its first span. Errors: as select_mean_key_cuda.
[[nodiscard]] Status build_page_lists_cuda(const CudaStepInput& input, const std::uint64_t* mask,
                                           const CudaPageLists& lists, void* workspace, std::int64_t workspace_bytes,
                                           void* stream);

/// Lists of all pages, one unit per chunk and sub-group: dense attention by the same kernel, kRequested. Needs no mask.
/// Errors: as select_mean_key_cuda.
[[nodiscard]] Status build_dense_lists_cuda(const CudaStepInput& input, const CudaPageLists& lists, void* workspace,
                                            std::int64_t workspace_bytes, void* stream);

/// Means of all complete pages of the chunks' requests, and their token counts, from the keys as stored, in the order
/// of docs/design/method.md 2.2, rounded to kv.dtype: the same bits as the cache's records rounded so.
///
/// mean_k       [num_pages, Hkv, D] of kv.dtype; pages that are not complete or nobody's are left alone
/// mean_tokens  [num_pages] or null
/// Errors: kInvalidArgument, kUnsupported (dtype, page size), kCudaError. Page ids outside the cache are skipped.
[[nodiscard]] Status page_means_cuda(const CudaStepInput& input, const PagedKvView& kv, void* mean_k,
                                     std::int32_t* mean_tokens, void* stream);

}  // namespace compact
