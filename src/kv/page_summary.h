/// Arithmetic of page means, fixed to the order of additions so that chunking, threads and backends give the same
/// bits (docs/design/method.md section 2.2). A page of P tokens is cut into granules of w tokens:
///
///   granule sum   fp32, tokens in ascending order, one after the other, from 0
///   page sum      granule sums in ascending order
///   mean          page sum / count, IEEE division
///
/// All values are those *stored* in the cache, after rounding to its dtype. The order is fixed per channel, so a
/// compiler may go through the channels in vectors; it must not reassociate (no -ffast-math).
#pragma once

#include <algorithm>
#include <cstdint>

#include "src/core/bf16.h"

namespace compact {

/// w: tokens whose keys are summed in one go.
[[nodiscard]] constexpr std::int32_t granule_tokens(std::int32_t page_tokens) noexcept {
  return std::min(32, page_tokens);
}

/// Continues the granule sums of a page with the tokens [first_token, first_token + tokens) of that page.
///
/// rows          [tokens, D]  stored K of one KV head, token_stride elements apart
/// granule_sums  [P/w, D]     sums up to first_token; a granule is cleared when its first token arrives
template <class T>  // float or Bf16
void continue_granule_sums(const T* rows, std::int64_t token_stride, std::int32_t first_token, std::int32_t tokens,
                           std::int32_t granule, std::int32_t head_dim, float* granule_sums) noexcept;

/// Mean of the first `count` >= 1 tokens of a page.
///
/// granule_sums  [P/w, D]  granules past the count are not read
/// mean          [D]
void finish_page_mean(const float* granule_sums, std::int32_t count, std::int32_t granule, std::int32_t head_dim,
                      float* mean) noexcept;

extern template void continue_granule_sums<float>(const float*, std::int64_t, std::int32_t, std::int32_t, std::int32_t,
                                                  std::int32_t, float*) noexcept;
extern template void continue_granule_sums<Bf16>(const Bf16*, std::int64_t, std::int32_t, std::int32_t, std::int32_t,
                                                 std::int32_t, float*) noexcept;

}  // namespace compact
