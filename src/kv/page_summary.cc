#include "src/kv/page_summary.h"

#include <algorithm>
#include <cmath>

namespace compact {
namespace {

inline float stored_value(float value) noexcept { return value; }
inline float stored_value(Bf16 value) noexcept { return to_float(value); }

template <class T>
float sum_of_squares(const T* __restrict row, std::int32_t head_dim) noexcept {
  constexpr std::int32_t kLanes = 16;
  float partial[kLanes] = {};
  std::int32_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    for (std::int32_t i = 0; i < kLanes; ++i) {
      const float value = stored_value(row[d + i]);
      partial[i] += value * value;
    }
  }
  for (; d < head_dim; ++d) {
    const float value = stored_value(row[d]);
    partial[d % kLanes] += value * value;
  }
  for (std::int32_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int32_t i = 0; i < half; ++i) partial[i] += partial[i + half];
  }
  return partial[0];
}

}  // namespace

template <class T>
void continue_granule_sums(const T* rows, std::int64_t token_stride, const float* norms, std::int32_t first_token,
                           std::int32_t tokens, std::int32_t granule, std::int32_t head_dim,
                           float* granule_sums) noexcept {
  for (std::int32_t i = 0; i < tokens; ++i) {
    const std::int32_t token = first_token + i;
    const T* __restrict row = rows + i * token_stride;
    float* __restrict sum = granule_sums + std::int64_t{token / granule} * head_dim;
    if (token % granule == 0) std::fill_n(sum, head_dim, 0.0F);
    if (norms == nullptr) {
      for (std::int32_t d = 0; d < head_dim; ++d) sum[d] += stored_value(row[d]);
    } else {
      const float scale = norms[i] == 0 ? 0.0F : 1.0F / norms[i];
      for (std::int32_t d = 0; d < head_dim; ++d) sum[d] += stored_value(row[d]) * scale;
    }
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

void finish_granule_means(const float* granule_sums, std::int32_t first_token, std::int32_t count, std::int32_t granule,
                          std::int32_t head_dim, float* means) noexcept {
  for (std::int32_t g = first_token / granule; g * granule < count; ++g) {
    const auto divisor = static_cast<float>(std::min(granule, count - g * granule));
    const float* __restrict sum = granule_sums + std::int64_t{g} * head_dim;
    float* __restrict mean = means + std::int64_t{g} * head_dim;
    for (std::int32_t d = 0; d < head_dim; ++d) mean[d] = sum[d] / divisor;
  }
}

template <class T>
void row_norms(const T* rows, std::int64_t token_stride, std::int32_t tokens, std::int32_t head_dim,
               float* norms) noexcept {
  for (std::int32_t i = 0; i < tokens; ++i) norms[i] = std::sqrt(sum_of_squares(rows + i * token_stride, head_dim));
}

float squared_norm(const float* row, std::int32_t head_dim) noexcept { return sum_of_squares(row, head_dim); }

void continue_gate_pools(const float* rows, std::int64_t token_stride, std::int32_t first_token, std::int32_t tokens,
                         std::int32_t head_dim, float* open_sum, float* pools) noexcept {
  for (std::int32_t i = 0; i < tokens; ++i) {
    const std::int32_t token = first_token + i;
    const float* __restrict row = rows + i * token_stride;
    float* __restrict largest = pools + std::int64_t{token / kGateBlockTokens} * 3 * head_dim;
    float* __restrict smallest = largest + head_dim;
    float* __restrict mean = smallest + head_dim;
    float* __restrict sum = open_sum;
    const std::int32_t in_block = token % kGateBlockTokens;
    if (in_block == 0) {
      for (std::int32_t d = 0; d < head_dim; ++d) sum[d] = largest[d] = smallest[d] = row[d];
    } else {
      for (std::int32_t d = 0; d < head_dim; ++d) {
        sum[d] += row[d];
        // A NaN stays: the comparison with it is false.
        largest[d] = largest[d] >= row[d] ? largest[d] : (largest[d] == largest[d] ? row[d] : largest[d]);
        smallest[d] = smallest[d] <= row[d] ? smallest[d] : (smallest[d] == smallest[d] ? row[d] : smallest[d]);
      }
    }
    if (in_block + 1 == kGateBlockTokens || i + 1 == tokens) {
      const auto divisor = static_cast<float>(in_block + 1);
      for (std::int32_t d = 0; d < head_dim; ++d) mean[d] = sum[d] / divisor;
    }
  }
}

template void continue_granule_sums<float>(const float*, std::int64_t, const float*, std::int32_t, std::int32_t,
                                           std::int32_t, std::int32_t, float*) noexcept;
template void continue_granule_sums<Bf16>(const Bf16*, std::int64_t, const float*, std::int32_t, std::int32_t,
                                          std::int32_t, std::int32_t, float*) noexcept;
template void row_norms<float>(const float*, std::int64_t, std::int32_t, std::int32_t, float*) noexcept;
template void row_norms<Bf16>(const Bf16*, std::int64_t, std::int32_t, std::int32_t, float*) noexcept;

}  // namespace compact
