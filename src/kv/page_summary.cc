#include "src/kv/page_summary.h"

namespace compact {
namespace {

inline float stored_value(float value) noexcept { return value; }
inline float stored_value(Bf16 value) noexcept { return to_float(value); }

}  // namespace

template <class T>
void continue_granule_sums(const T* rows, std::int64_t token_stride, std::int32_t first_token, std::int32_t tokens,
                           std::int32_t granule, std::int32_t head_dim, float* granule_sums) noexcept {
  for (std::int32_t i = 0; i < tokens; ++i) {
    const std::int32_t token = first_token + i;
    const T* __restrict row = rows + i * token_stride;
    float* __restrict sum = granule_sums + std::int64_t{token / granule} * head_dim;
    if (token % granule == 0) std::fill_n(sum, head_dim, 0.0F);
    for (std::int32_t d = 0; d < head_dim; ++d) sum[d] += stored_value(row[d]);
  }
}

void finish_page_mean(const float* granule_sums, std::int32_t count, std::int32_t granule, std::int32_t head_dim,
                      float* mean) noexcept {
  const std::int32_t num_granules = (count + granule - 1) / granule;
  const auto divisor = static_cast<float>(count);  // at most 256: exact
  float* __restrict sum = mean;
  std::copy_n(granule_sums, head_dim, sum);
  for (std::int32_t g = 1; g < num_granules; ++g) {
    const float* __restrict next = granule_sums + std::int64_t{g} * head_dim;
    for (std::int32_t d = 0; d < head_dim; ++d) sum[d] += next[d];
  }
  for (std::int32_t d = 0; d < head_dim; ++d) sum[d] /= divisor;
}

template void continue_granule_sums<float>(const float*, std::int64_t, std::int32_t, std::int32_t, std::int32_t,
                                           std::int32_t, float*) noexcept;
template void continue_granule_sums<Bf16>(const Bf16*, std::int64_t, std::int32_t, std::int32_t, std::int32_t,
                                          std::int32_t, float*) noexcept;

}  // namespace compact
