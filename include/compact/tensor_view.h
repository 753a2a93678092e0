/// Views of memory that somebody else owns. Strides are in elements, 64 bit: page offsets pass 2^31.
#pragma once

#include <cstdint>

namespace compact {

enum class DType : std::int32_t {
  kF32 = 0,
  kBF16 = 1,  ///< IEEE binary32 with the low 16 bits dropped, round to nearest even
  kF16 = 2,   ///< IEEE binary16; CUDA attention only
};

[[nodiscard]] constexpr std::int64_t dtype_bytes(DType dtype) noexcept { return dtype == DType::kF32 ? 4 : 2; }
[[nodiscard]] constexpr const char* dtype_name(DType dtype) noexcept {
  return dtype == DType::kF32 ? "f32" : dtype == DType::kBF16 ? "bf16" : "f16";
}

/// Query or output rows of a ragged batch: [T, heads, D] fp32, D contiguous.
template <class T>
struct RowsView {
  T* data = nullptr;
  std::int32_t tokens = 0;        // T
  std::int32_t heads = 0;         // Hq, or Hkv for K and V rows
  std::int32_t head_dim = 0;      // D
  std::int64_t token_stride = 0;  // elements between tokens
  std::int64_t head_stride = 0;   // elements between heads

  [[nodiscard]] T* row(std::int32_t token, std::int32_t head) const noexcept {
    return data + token * token_stride + head * head_stride;
  }
};

using ConstRows = RowsView<const float>;
using MutableRows = RowsView<float>;

/// Rows stored token by token without gaps: [tokens, heads, head_dim].
template <class T>
[[nodiscard]] constexpr RowsView<T> contiguous_rows(T* data, std::int32_t tokens, std::int32_t heads,
                                                    std::int32_t head_dim) noexcept {
  return {data, tokens, heads, head_dim, std::int64_t{heads} * head_dim, head_dim};
}

/// K and V of one layer in pages. Any layout with D contiguous is expressed by the strides:
/// HND [num_pages, Hkv, P, D] or NHD [num_pages, P, Hkv, D].
struct PagedKvView {
  const void* k = nullptr;
  const void* v = nullptr;
  DType dtype = DType::kF32;
  std::int32_t num_pages = 0;     // physical pages in the cache
  std::int32_t num_kv_heads = 0;  // Hkv
  std::int32_t page_tokens = 0;   // P
  std::int32_t head_dim = 0;      // D
  std::int64_t page_stride = 0;   // elements; K and V alike
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 0;

  /// Element offset of (physical page, token in page, KV head); the same for K and V.
  [[nodiscard]] std::int64_t offset(std::int32_t page, std::int32_t token, std::int32_t kv_head) const noexcept {
    return page * page_stride + token * token_stride + kv_head * head_stride;
  }
};

/// w: tokens whose keys are summed in one go; page means are sums of granule sums (docs/design/method.md 2.2).
[[nodiscard]] constexpr std::int32_t granule_tokens(std::int32_t page_tokens) noexcept {
  return page_tokens < 32 ? page_tokens : 32;
}

/// Tokens that an AttnGate pools; pages hold whole blocks of them.
inline constexpr std::int32_t kGateBlockTokens = 64;

/// Which records a cache keeps per page beside K and V, and which ones a selector reads (docs/design/method.md 2.1).
/// All are of K and V as stored, after RoPE, except gate_pool.
struct SummaryFields {
  bool mean_k = false;      ///< mean key of a page
  bool sub_mean_k = false;  ///< mean keys of its granules
  bool mean_v = false;      ///< mean value of a page
  bool norm_k = false;      ///< norm of every key
  bool coherence = false;   ///< squared norm of the mean of k / norm(k): 1 if all keys point one way
  bool gate_pool = false;   ///< maximum, minimum and mean of keys before RoPE, per 64 tokens

  [[nodiscard]] bool any() const noexcept { return mean_k || sub_mean_k || mean_v || norm_k || coherence || gate_pool; }
};

/// Summaries of one layer, one record per (physical page, KV head). Null: not kept.
struct PageSummaryView {
  const float* mean_k = nullptr;        // [num_pages, Hkv, D]
  const std::int32_t* count = nullptr;  // [num_pages]  tokens that the records cover
  std::int32_t num_pages = 0;
  std::int32_t num_kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t page_tokens = 0;       // P
  const float* sub_mean_k = nullptr;  // [num_pages, Hkv, P/w, D]  a granule without tokens is not written
  const float* mean_v = nullptr;      // [num_pages, Hkv, D]
  const float* norm_k = nullptr;      // [num_pages, Hkv, P]
  const float* coherence = nullptr;   // [num_pages, Hkv]
  const float* gate_pool = nullptr;   // [num_pages, Hkv, P/64, 3, D]  maximum, minimum, mean

  [[nodiscard]] std::int64_t record(std::int32_t page, std::int32_t kv_head) const noexcept {
    return std::int64_t{page} * num_kv_heads + kv_head;
  }
  [[nodiscard]] const float* mean(std::int32_t page, std::int32_t kv_head) const noexcept {
    return mean_k + record(page, kv_head) * head_dim;
  }
  [[nodiscard]] const float* value_mean(std::int32_t page, std::int32_t kv_head) const noexcept {
    return mean_v + record(page, kv_head) * head_dim;
  }
  [[nodiscard]] const float* sub_mean(std::int32_t page, std::int32_t kv_head, std::int32_t granule) const noexcept {
    const std::int32_t granules = page_tokens / granule_tokens(page_tokens);
    return sub_mean_k + (record(page, kv_head) * granules + granule) * head_dim;
  }
  [[nodiscard]] const float* norms(std::int32_t page, std::int32_t kv_head) const noexcept {  // [P]
    return norm_k + record(page, kv_head) * page_tokens;
  }
  [[nodiscard]] const float* gate_block(std::int32_t page, std::int32_t kv_head, std::int32_t block) const noexcept {
    return gate_pool + (record(page, kv_head) * (page_tokens / kGateBlockTokens) + block) * 3 * head_dim;  // [3, D]
  }
};

/// One request's part of a step: a chunk of C query tokens that attends to L = S + C context tokens.
struct ChunkView {
  std::int32_t q_begin = 0;                  // first row of the chunk in Q and O
  std::int32_t chunk_tokens = 0;             // C; 0 is allowed and does nothing
  std::int32_t chunk_start = 0;              // S, absolute position of the first query
  const std::int32_t* page_table = nullptr;  // [ceil(L / P)] physical page of each logical page

  [[nodiscard]] std::int32_t context_tokens() const noexcept { return chunk_start + chunk_tokens; }  // L
  [[nodiscard]] std::int32_t num_past_pages(std::int32_t page_tokens) const noexcept {               // Np
    return chunk_start / page_tokens;
  }
  [[nodiscard]] std::int32_t num_pages(std::int32_t page_tokens) const noexcept {  // Kb
    return (context_tokens() + page_tokens - 1) / page_tokens;
  }
};

}  // namespace compact
