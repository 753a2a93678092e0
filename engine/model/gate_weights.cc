#include "engine/model/gate_weights.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "engine/loader/rope_frequencies.h"
#include "engine/loader/safetensors.h"
#include "engine/model/linear.h"

namespace compact::engine {
namespace {

using Shape = std::vector<std::int64_t>;

std::string gate_name(std::int32_t layer, const char* map) {
  return fmt::format("model.layers.{}.self_attn.attn_gate.{}.weight", layer, map);
}

// Appends a map of one layer to `all`. `allowed`: the shapes that it may have.
Result<Shape> append_map(const SafetensorsFile& file, std::int32_t layer, const char* map,
                         const std::vector<Shape>& allowed, std::vector<float>& all) {
  const std::string name = gate_name(layer, map);
  const TensorInfo* tensor = file.find(name);
  if (tensor == nullptr) return io_error(fmt::format("{}: tensor {} is missing", file.path(), name));
  if (std::find(allowed.begin(), allowed.end(), tensor->shape) == allowed.end()) {
    return io_error(fmt::format("{}: tensor {} has shape {}\n  allowed: {}", file.path(), name, tensor->shape,
                                fmt::join(allowed, " or ")));
  }
  if (std::find(kWeightTypes.begin(), kWeightTypes.end(), tensor->dtype) == kWeightTypes.end()) {
    return unsupported(fmt::format("{}: tensor {} is {}\n  allowed: {}", file.path(), name,
                                   data_type_name(tensor->dtype), data_type_list(kWeightTypes)));
  }
  const std::int64_t count = tensor->shape[0] * tensor->shape[1] * tensor->shape[2];
  const std::size_t begin = all.size();
  all.resize(begin + static_cast<std::size_t>(count));
  widen_to_f32({name, tensor->dtype, tensor->shape, tensor->bytes}, 0, count, all.data() + begin);
  return tensor->shape;
}

Result<GateWeights> read_gates(const std::filesystem::path& path, const ModelConfig& config) {
  CA_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::open(path));
  const std::int64_t q_heads = config.num_attention_heads;
  const std::int64_t kv_heads = config.num_key_value_heads;
  const std::int64_t dim = config.head_dim;
  GateWeights gates;
  gates.num_layers = config.num_hidden_layers;
  gates.num_q_heads = config.num_attention_heads;
  gates.num_kv_heads = config.num_key_value_heads;
  gates.head_dim = config.head_dim;
  gates.inverse_frequencies = rope_inverse_frequencies(config);
  const bool has_query = file.find(gate_name(0, "mask_linear_q")) != nullptr;
  // Without a map of the queries every query head has a key map of its own.
  std::vector<Shape> key_shapes = {{has_query ? kv_heads : q_heads, 3 * dim, dim}};
  std::vector<Shape> query_shapes = {{q_heads, dim, dim}, {kv_heads, q_heads / kv_heads * dim, dim}};
  gates.key_heads = static_cast<std::int32_t>(key_shapes.front()[0]);
  gates.mask_heads = config.num_attention_heads;
  for (std::int32_t layer = 0; layer < gates.num_layers; ++layer) {
    CA_ASSIGN_OR_RETURN([[maybe_unused]] const Shape key_shape,
                        append_map(file, layer, "mask_linear_k", key_shapes, gates.key));
    const bool layer_has_query = file.find(gate_name(layer, "mask_linear_q")) != nullptr;
    if (layer_has_query != has_query) {
      return io_error(fmt::format("{}: {} is {}\n  allowed: a map of the queries in every layer, or in none",
                                  path.string(), gate_name(layer, "mask_linear_q"),
                                  layer_has_query ? "there, but not in layer 0" : "missing"));
    }
    if (!has_query) continue;
    CA_ASSIGN_OR_RETURN(Shape query_shape, append_map(file, layer, "mask_linear_q", query_shapes, gates.query));
    gates.mask_heads = static_cast<std::int32_t>(query_shape[0]);
    query_shapes = {std::move(query_shape)};  // the same in all layers
  }
  return gates;
}

}  // namespace

Result<std::shared_ptr<const GateWeights>> load_gates(const std::filesystem::path& path, const ModelConfig& config) {
  // Gates of a large model take hundreds of megabytes, and a comparison makes many selectors of one file.
  static std::map<std::string, std::weak_ptr<const GateWeights>> in_use;
  std::weak_ptr<const GateWeights>& known = in_use[path.string()];
  std::shared_ptr<const GateWeights> gates = known.lock();
  if (gates != nullptr && gates->num_layers == config.num_hidden_layers && gates->head_dim == config.head_dim &&
      gates->num_q_heads == config.num_attention_heads && gates->num_kv_heads == config.num_key_value_heads) {
    return gates;
  }
  CA_ASSIGN_OR_RETURN(GateWeights fresh, read_gates(path, config));
  gates = std::make_shared<const GateWeights>(std::move(fresh));
  known = gates;
  return gates;
}

}  // namespace compact::engine
