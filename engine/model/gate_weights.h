/// Weights of SeerAttention's AttnGates, as tools/convert_gates.py writes them.
#pragma once

#include <filesystem>
#include <memory>

#include "compact/selector.h"
#include "compact/status.h"
#include "engine/loader/model_config.h"

namespace compact::engine {

/// Reads a safetensors file with, for every layer n of the model,
///   model.layers.{n}.self_attn.attn_gate.mask_linear_k.weight   [Hq or Hkv, 3 D, D]
///   model.layers.{n}.self_attn.attn_gate.mask_linear_q.weight   [Hq, D, D] or [Hkv, G D, D]; none if the key maps are
///   Hq
/// The shapes of layer 0 tell which gate it is. What is in use already is not read again.
/// Errors: kIoError for a missing tensor, a shape that differs from the model's or between layers (says what is
/// allowed), a map without its partner; those of SafetensorsFile.
[[nodiscard]] Result<std::shared_ptr<const GateWeights>> load_gates(const std::filesystem::path& path,
                                                                    const ModelConfig& config);

}  // namespace compact::engine
