#include "engine/model/layers.h"

#include <cmath>
#include <cstddef>

namespace compact::engine {

void rms_norm(const float* x, const float* weight, float eps, std::int32_t rows, std::int32_t width, float* out,
              ThreadPool& pool) {
  pool.parallel_for(rows, [&](std::int64_t row, std::int32_t) {
    const float* in = x + row * width;
    float* result = out + row * width;
    double sum_of_squares = 0;  // fp64: rows of 4096 and more lose digits otherwise
    for (std::int32_t i = 0; i < width; ++i) sum_of_squares += static_cast<double>(in[i]) * static_cast<double>(in[i]);
    const auto scale = static_cast<float>(1.0 / std::sqrt(sum_of_squares / width + static_cast<double>(eps)));
    for (std::int32_t i = 0; i < width; ++i) result[i] = in[i] * scale * weight[i];
  });
}

RopeTable make_rope_table(const std::vector<float>& inverse_frequencies, std::span<const std::int32_t> positions) {
  RopeTable table;
  const std::size_t half_dim = inverse_frequencies.size();
  table.half_dim = static_cast<std::int32_t>(half_dim);
  table.cosines.resize(positions.size() * half_dim);
  table.sines.resize(table.cosines.size());
  for (std::size_t token = 0; token < positions.size(); ++token) {
    const auto position = static_cast<float>(positions[token]);
    for (std::size_t i = 0; i < half_dim; ++i) {
      const float angle = inverse_frequencies[i] * position;
      const std::size_t at = token * half_dim + i;
      // Range reduction of a large angle is exact in double.
      table.cosines[at] = static_cast<float>(std::cos(static_cast<double>(angle)));
      table.sines[at] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
  return table;
}

void apply_rope(const RopeTable& table, MutableRows rows, ThreadPool& pool) {
  const std::int32_t half = table.half_dim;
  pool.parallel_for(rows.tokens, [&](std::int64_t token, std::int32_t) {
    const float* cosine = table.cosines.data() + token * half;
    const float* sine = table.sines.data() + token * half;
    for (std::int32_t head = 0; head < rows.heads; ++head) {
      float* x = rows.row(static_cast<std::int32_t>(token), head);
      for (std::int32_t i = 0; i < half; ++i) {
        const float low = x[i];
        const float high = x[i + half];
        x[i] = low * cosine[i] - high * sine[i];
        x[i + half] = high * cosine[i] + low * sine[i];
      }
    }
  });
}

void silu_multiply(float* gate, const float* up, std::int32_t rows, std::int32_t width, ThreadPool& pool) {
  pool.parallel_for(rows, [&](std::int64_t row, std::int32_t) {
    float* g = gate + row * width;
    const float* u = up + row * width;
    for (std::int32_t i = 0; i < width; ++i) g[i] = silu(g[i]) * u[i];
  });
}

}  // namespace compact::engine
