/// Arithmetic of page summaries, fixed to the order of additions so that chunking, threads and backends give the same
/// bits (docs/design/method.md section 2.2). A page of P tokens is cut into granules of w tokens:
///
///   granule sum   fp32, tokens in ascending order, one after the other, from 0
///   granule mean  granule sum / tokens in the granule, IEEE division
///   page sum      granule sums in ascending order
///   mean          page sum / count
///   norm          square root of the sum of squares: 16 partial sums (dimension d in number d mod 16, ascending),
///   joined
///                 by halves; products are rounded before they are added
///   coherence     squared norm of the mean of k * (1 / norm); a key of norm 0 counts as 0
///   gate pool     maximum and minimum, and the sum of up to 64 tokens in ascending order, divided by their count
///
/// All values are those *stored* in the cache, after rounding to its dtype, except the gate pool's, which are pre-RoPE
/// keys as given. The order is fixed per channel, so a compiler may go through the channels in vectors; it must neither
/// reassociate nor fuse (page_summary.cc is compiled with -ffp-contract=off).
#pragma once

#include <cstdint>

#include "compact/tensor_view.h"
#include "src/core/bf16.h"

namespace compact {

/// Continues the granule sums of a page with the tokens [first_token, first_token + tokens) of that page.
///
/// rows          [tokens, D]  stored K or V of one KV head, token_stride elements apart
/// norms         [tokens]     null, or each row is multiplied with 1 / norm first
/// granule_sums  [P/w, D]     sums up to first_token; a granule is cleared when its first token arrives
template <class T>  // float or Bf16
void continue_granule_sums(const T* rows, std::int64_t token_stride, const float* norms, std::int32_t first_token,
                           std::int32_t tokens, std::int32_t granule, std::int32_t head_dim,
                           float* granule_sums) noexcept;

/// Mean of the first `count` >= 1 tokens of a page.
///
/// granule_sums  [P/w, D]  granules past the count are not read
/// mean          [D]
void finish_page_mean(const float* granule_sums, std::int32_t count, std::int32_t granule, std::int32_t head_dim,
                      float* mean) noexcept;

/// Means of the granules that hold the tokens [first_token, count) of a page.
///
/// granule_sums, means  [P/w, D]
void finish_granule_means(const float* granule_sums, std::int32_t first_token, std::int32_t count, std::int32_t granule,
                          std::int32_t head_dim, float* means) noexcept;

/// norms: [tokens].
template <class T>  // float or Bf16
void row_norms(const T* rows, std::int64_t token_stride, std::int32_t tokens, std::int32_t head_dim,
               float* norms) noexcept;

/// Sum of squares of a vector, in the order of norms.
[[nodiscard]] float squared_norm(const float* row, std::int32_t head_dim) noexcept;

/// Continues the pools of a page's gate blocks with the tokens [first_token, first_token + rows.tokens).
///
/// rows      [tokens, D] of one KV head, token_stride elements apart, before RoPE
/// open_sum  [D]             sum of the block that first_token falls in; cleared when a block begins
/// pools     [P/64, 3, D]    of the page; those of touched blocks are rewritten
void continue_gate_pools(const float* rows, std::int64_t token_stride, std::int32_t first_token, std::int32_t tokens,
                         std::int32_t head_dim, float* open_sum, float* pools) noexcept;

}  // namespace compact
