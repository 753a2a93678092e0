/// Rotary position embedding: the angle per token of each pair of dimensions.
#pragma once

#include <vector>

#include "engine/loader/model_config.h"

namespace compact::engine {

/// [D/2] radians per token, descending: rope_theta^(-2i/D), then the scaling of `config`. Computed in float32 step by
/// step as transformers does, so that a long position turns by the same angle; tests/golden/make_rope_goldens.py
/// compares. Source: "llama3" and "linear" of transformers' modeling_rope_utils.py.
[[nodiscard]] std::vector<float> rope_inverse_frequencies(const ModelConfig& config);

}  // namespace compact::engine
