/// The layers of a Llama-like block that are not matrix products: norms, rotation, activation. All fp32.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "compact/tensor_view.h"
#include "compact/thread_pool.h"

namespace compact::engine {

/// out[t, :] = x[t, :] / rms(x[t, :]) * weight.  x, out: [rows, width]; weight: [width]. In place is allowed.
void rms_norm(const float* x, const float* weight, float eps, std::int32_t rows, std::int32_t width, float* out,
              ThreadPool& pool);

/// cos and sin of the positions of some tokens: [tokens, D/2] each.
struct RopeTable {
  std::int32_t half_dim = 0;
  std::vector<float> cosines;
  std::vector<float> sines;
};

/// Angle = inverse_frequency * position, rounded to fp32 as transformers does.
[[nodiscard]] RopeTable make_rope_table(const std::vector<float>& inverse_frequencies,
                                        std::span<const std::int32_t> positions);

/// Rotates every head of every token in place; pairs are (d, d + D/2), as in Hugging Face checkpoints.
void apply_rope(const RopeTable& table, MutableRows rows, ThreadPool& pool);

[[nodiscard]] inline float silu(float x) { return x / (1.0F + std::exp(-x)); }

/// gate[i] = silu(gate[i]) * up[i].  gate, up: [rows, width].
void silu_multiply(float* gate, const float* up, std::int32_t rows, std::int32_t width, ThreadPool& pool);

}  // namespace compact::engine
