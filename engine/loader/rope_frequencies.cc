#include "engine/loader/rope_frequencies.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>

namespace compact::engine {
namespace {

// Bounds and slopes are divided in double and rounded once, as Python scalars are when they meet a float32 tensor.
float llama3_frequency(float frequency, const RopeScaling& scaling) {
  const double context = scaling.original_max_position_embeddings;  // tokens
  const auto long_wavelength = static_cast<float>(context / scaling.low_freq_factor);
  const auto short_wavelength = static_cast<float>(context / scaling.high_freq_factor);
  const auto factor = static_cast<float>(scaling.factor);

  const float wavelength = static_cast<float>(2.0 * std::numbers::pi) / frequency;  // tokens per full turn
  if (wavelength > long_wavelength) return frequency / factor;
  if (wavelength < short_wavelength) return frequency;
  const float smooth = (static_cast<float>(context) / wavelength - static_cast<float>(scaling.low_freq_factor)) /
                       static_cast<float>(scaling.high_freq_factor - scaling.low_freq_factor);
  return (1.0f - smooth) * frequency / factor + smooth * frequency;
}

}  // namespace

std::vector<float> rope_inverse_frequencies(const ModelConfig& config) {
  const auto head_dim = static_cast<float>(config.head_dim);
  const auto theta = static_cast<float>(config.rope_theta);
  std::vector<float> frequencies(static_cast<std::size_t>(config.head_dim / 2));
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / head_dim;
    // In double and rounded: float powf differs between C libraries in the last bit, this does not.
    const auto power = static_cast<float>(std::pow(static_cast<double>(theta), static_cast<double>(exponent)));
    const float frequency = 1.0f / power;
    const RopeScaling& scaling = config.rope_scaling;
    switch (scaling.kind) {
      case RopeScaling::Kind::kNone: frequencies[i] = frequency; break;
      case RopeScaling::Kind::kLinear: frequencies[i] = frequency / static_cast<float>(scaling.factor); break;
      case RopeScaling::Kind::kLlama3: frequencies[i] = llama3_frequency(frequency, scaling); break;
    }
  }
  return frequencies;
}

}  // namespace compact::engine
