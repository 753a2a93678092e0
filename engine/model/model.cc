#include "engine/model/model.h"

#include <fmt/format.h>

#include <cmath>

namespace compact::engine {

float softmax_scale(const ModelConfig& config) noexcept {
  return 1.0F / std::sqrt(static_cast<float>(config.head_dim));
}

SummaryFields either(const SummaryFields& a, const SummaryFields& b) {
  return {.mean_k = a.mean_k || b.mean_k,
          .sub_mean_k = a.sub_mean_k || b.sub_mean_k,
          .mean_v = a.mean_v || b.mean_v,
          .norm_k = a.norm_k || b.norm_k,
          .coherence = a.coherence || b.coherence,
          .gate_pool = a.gate_pool || b.gate_pool};
}

Status check_chunk(const ModelConfig& config, std::span<const std::int32_t> tokens, std::int64_t start) {
  for (const std::int32_t token : tokens) {
    if (token < 0 || token >= config.vocab_size) {
      return invalid_argument(
          fmt::format("token id {} is not in the model's vocabulary of {}", token, config.vocab_size));
    }
  }
  if (start + std::ssize(tokens) > config.max_position_embeddings) {
    return invalid_argument(fmt::format("the context needs {} positions; the model was made for {}",
                                        start + std::ssize(tokens), config.max_position_embeddings));
  }
  return {};
}

}  // namespace compact::engine
