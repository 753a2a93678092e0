#include "engine/loader/model_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <system_error>
#include <utility>

#include "engine/loader/json.h"
#include "engine/loader/mapped_file.h"

namespace compact::engine {
namespace {

using Json = nlohmann::json;

// Bounds are far beyond every published model and keep each product of two of them inside int64_t, and
// heads * head_dim inside int32_t.
constexpr std::int32_t kMaxVocab = 1 << 24;
constexpr std::int32_t kMaxHidden = 1 << 20;
constexpr std::int32_t kMaxIntermediate = 1 << 22;
constexpr std::int32_t kMaxLayers = 1 << 10;
constexpr std::int32_t kMaxHeads = 1 << 12;
constexpr std::int32_t kMaxHeadDim = 1 << 12;
constexpr std::int32_t kMaxExperts = 1 << 12;
constexpr std::int32_t kMaxPositions = 1 << 30;
constexpr double kMaxTheta = 1e15;
constexpr double kMaxFactor = 1e6;
constexpr std::size_t kMaxEosTokens = 64;

struct KnownArchitecture {
  Architecture architecture;
  const char* name;
};
constexpr KnownArchitecture kKnownArchitectures[] = {
    {Architecture::kLlama, "LlamaForCausalLM"},
    {Architecture::kQwen3, "Qwen3ForCausalLM"},
    {Architecture::kQwen3Moe, "Qwen3MoeForCausalLM"},
};

// An object of the file with the path that leads to it ("" or "rope_parameters."), so that every message can name the
// whole key.
class Section {
 public:
  Section(const Json& object, std::string_view file_name, std::string prefix = {})
      : object_(object), file_name_(file_name), prefix_(std::move(prefix)) {}

  [[nodiscard]] const std::string& file_name() const noexcept { return file_name_; }
  [[nodiscard]] std::string name_of(const char* key) const { return prefix_ + key; }

  /// Null if absent or null.
  [[nodiscard]] const Json* find(const char* key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  [[nodiscard]] Status refused(const char* key, const Json& seen, std::string_view allowed) const {
    return io_error(fmt::format("{}: {} is {}; allowed: {}", file_name_, name_of(key), shown(seen), allowed));
  }
  [[nodiscard]] Status not_implemented(const char* key, const Json& seen, std::string_view allowed) const {
    return unsupported(fmt::format("{}: {} is {}, which is not implemented; allowed: {}", file_name_, name_of(key),
                                   shown(seen), allowed));
  }
  [[nodiscard]] Status missing(const char* key, std::string_view allowed) const {
    return io_error(fmt::format("{}: {} is missing; allowed: {}", file_name_, name_of(key), allowed));
  }

  /// In [low, high]; `fallback` if absent, an error if there is none.
  [[nodiscard]] Result<std::int32_t> integer(const char* key, std::int32_t low, std::int32_t high,
                                             std::optional<std::int32_t> fallback = std::nullopt) const {
    const std::string allowed = fmt::format("an integer from {} to {}", low, high);
    const Json* value = find(key);
    if (!value) return fallback ? Result<std::int32_t>(*fallback) : missing(key, allowed);
    if (const auto number = to_integer(*value, low, high)) return *number;
    return refused(key, *value, allowed);
  }

  /// In (above, high].
  [[nodiscard]] Result<double> number(const char* key, double above, double high,
                                      std::optional<double> fallback = std::nullopt) const {
    const std::string allowed = fmt::format("a number above {} and at most {}", above, high);
    const Json* value = find(key);
    if (!value) return fallback ? Result<double>(*fallback) : missing(key, allowed);
    if (!value->is_number()) return refused(key, *value, allowed);
    const double number = value->get<double>();
    if (!(number > above && number <= high)) return refused(key, *value, allowed);
    return number;
  }

  [[nodiscard]] Result<bool> boolean(const char* key, bool fallback) const {
    const Json* value = find(key);
    if (!value) return fallback;
    if (!value->is_boolean()) return refused(key, *value, "true or false");
    return value->get<bool>();
  }

  /// Null if absent.
  [[nodiscard]] Result<const std::string*> text(const char* key, std::string_view allowed) const {
    const Json* value = find(key);
    if (!value) return static_cast<const std::string*>(nullptr);
    if (!value->is_string()) return refused(key, *value, allowed);
    return value->get_ptr<const std::string*>();
  }

  /// A list of integers in [low, high]; empty if absent.
  [[nodiscard]] Result<std::vector<std::int32_t>> integers(const char* key, std::int32_t low, std::int32_t high) const {
    std::vector<std::int32_t> numbers;
    const Json* value = find(key);
    if (!value) return numbers;
    const std::string allowed = fmt::format("a list of integers from {} to {}", low, high);
    if (!value->is_array() || std::ssize(*value) > std::ptrdiff_t{high} - low + 1) return refused(key, *value, allowed);
    for (const Json& element : *value) {
      const auto number = to_integer(element, low, high);
      if (!number) {
        return io_error(
            fmt::format("{}: {} contains {}; allowed: {}", file_name_, name_of(key), shown(element), allowed));
      }
      numbers.push_back(*number);
    }
    return numbers;
  }

  /// One token id, or a list of them.
  [[nodiscard]] Result<std::vector<std::int32_t>> token_ids(const char* key, std::int32_t vocab_size) const {
    std::vector<std::int32_t> ids;
    const Json* value = find(key);
    if (!value) return ids;
    const std::string allowed =
        fmt::format("a token id from 0 to {}, or a list of at most {} of them", vocab_size - 1, kMaxEosTokens);
    if (!value->is_array()) {
      const auto id = to_integer(*value, 0, vocab_size - 1);
      if (!id) return refused(key, *value, allowed);
      ids.push_back(*id);
      return ids;
    }
    if (value->size() > kMaxEosTokens) return refused(key, *value, allowed);
    for (const Json& element : *value) {
      const auto id = to_integer(element, 0, vocab_size - 1);
      if (!id) {
        return io_error(
            fmt::format("{}: {} contains {}; allowed: {}", file_name_, name_of(key), shown(element), allowed));
      }
      if (std::find(ids.begin(), ids.end(), *id) == ids.end()) ids.push_back(*id);
    }
    return ids;
  }

 private:
  static std::optional<std::int32_t> to_integer(const Json& value, std::int32_t low, std::int32_t high) {
    if (!value.is_number_integer()) return std::nullopt;
    // An unsigned value beyond int64_t would wrap into range.
    if (value.is_number_unsigned() && value.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX)) {
      return std::nullopt;
    }
    const auto number = value.get<std::int64_t>();
    if (number < low || number > high) return std::nullopt;
    return static_cast<std::int32_t>(number);
  }

  const Json& object_;
  std::string file_name_;
  std::string prefix_;
};

std::string known_architectures() {
  std::string list;
  for (const auto& known : kKnownArchitectures) {
    if (!list.empty()) list += ", ";
    list += known.name;
  }
  return list;
}

Result<Architecture> read_architecture(const Section& root) {
  const std::string allowed = fmt::format("a list of one of {}", known_architectures());
  const Json* value = root.find("architectures");
  if (!value) return root.missing("architectures", allowed);
  if (!value->is_array() || value->size() != 1 || !value->front().is_string()) {
    return root.refused("architectures", *value, allowed);
  }
  const auto& name = value->front().get_ref<const std::string&>();
  for (const auto& known : kKnownArchitectures) {
    if (name == known.name) return known.architecture;
  }
  return unsupported(
      fmt::format("{}: unknown architecture {}; allowed: {}", root.file_name(), quote(name), known_architectures()));
}

Result<std::optional<DataType>> read_dtype(const Section& root) {
  std::optional<DataType> seen;
  // transformers 5 writes "dtype", 4 wrote "torch_dtype".
  for (const char* key : {"dtype", "torch_dtype"}) {
    constexpr const char* kAllowed = "\"float32\", \"bfloat16\" or \"float16\"";
    CA_ASSIGN_OR_RETURN(const std::string* const name, root.text(key, kAllowed));
    if (!name) continue;
    std::optional<DataType> type;
    if (*name == "float32") type = DataType::kF32;
    if (*name == "bfloat16") type = DataType::kBF16;
    if (*name == "float16") type = DataType::kF16;
    if (!type) return root.not_implemented(key, *name, kAllowed);
    if (seen && seen != type) {
      return io_error(fmt::format("{}: dtype and torch_dtype contradict each other", root.file_name()));
    }
    seen = type;
  }
  return seen;
}

Result<RopeScaling> read_rope_scaling(const Section& rope, std::int32_t max_position_embeddings) {
  constexpr const char* kAllowed = "\"default\", \"linear\", \"llama3\"";
  RopeScaling scaling;
  // "type" is the older name of "rope_type"; many files carry both.
  CA_ASSIGN_OR_RETURN(const std::string* const new_type, rope.text("rope_type", kAllowed));
  CA_ASSIGN_OR_RETURN(const std::string* const old_type, rope.text("type", kAllowed));
  if (new_type && old_type && *new_type != *old_type) {
    return io_error(fmt::format("{}: {} {} and {} {} contradict each other", rope.file_name(),
                                rope.name_of("rope_type"), quote(*new_type), rope.name_of("type"), quote(*old_type)));
  }
  const char* key = new_type ? "rope_type" : "type";
  const std::string type = new_type ? *new_type : old_type ? *old_type : "default";

  if (type == "default") return scaling;
  if (type == "linear") {
    scaling.kind = RopeScaling::Kind::kLinear;
  } else if (type == "llama3") {
    scaling.kind = RopeScaling::Kind::kLlama3;
  } else {
    return rope.not_implemented(key, type, kAllowed);
  }

  CA_ASSIGN_OR_RETURN(scaling.factor, rope.number("factor", 0.0, kMaxFactor));
  if (scaling.kind == RopeScaling::Kind::kLinear) return scaling;

  CA_ASSIGN_OR_RETURN(scaling.low_freq_factor, rope.number("low_freq_factor", 0.0, kMaxFactor));
  CA_ASSIGN_OR_RETURN(scaling.high_freq_factor, rope.number("high_freq_factor", 0.0, kMaxFactor));
  if (scaling.high_freq_factor <= scaling.low_freq_factor) {
    return rope.refused("high_freq_factor", scaling.high_freq_factor,
                        fmt::format("a number above low_freq_factor, {}", scaling.low_freq_factor));
  }
  CA_ASSIGN_OR_RETURN(scaling.original_max_position_embeddings,
                      rope.integer("original_max_position_embeddings", 1, kMaxPositions, max_position_embeddings));
  return scaling;
}

// Sets rope_theta and rope_scaling, from the top level (transformers 4) and from rope_parameters (5).
Status read_rope(const Section& root, ModelConfig& config) {
  // transformers lets a length beside rope_scaling, as Phi-3 writes it, take precedence; no known architecture has it.
  if (const Json* seen = root.find("original_max_position_embeddings")) {
    return root.not_implemented("original_max_position_embeddings", *seen, "only inside the RoPE parameters");
  }
  CA_ASSIGN_OR_RETURN(config.rope_theta, root.number("rope_theta", 1.0, kMaxTheta, 10000.0));
  const bool theta_at_top = root.find("rope_theta") != nullptr;

  const char* seen_key = nullptr;
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    const Json* value = root.find(key);
    if (!value) continue;
    if (!value->is_object()) return root.refused(key, *value, "an object");
    const Section rope(*value, root.file_name(), fmt::format("{}.", key));

    CA_ASSIGN_OR_RETURN(const double theta, rope.number("rope_theta", 1.0, kMaxTheta, config.rope_theta));
    CA_ASSIGN_OR_RETURN(const RopeScaling scaling, read_rope_scaling(rope, config.max_position_embeddings));
    if (theta_at_top && theta != config.rope_theta) {
      return io_error(fmt::format("{}: rope_theta {} and {} {} contradict each other", root.file_name(),
                                  config.rope_theta, rope.name_of("rope_theta"), theta));
    }
    if (seen_key && (scaling != config.rope_scaling || theta != config.rope_theta)) {
      return io_error(fmt::format("{}: {} and {} contradict each other", root.file_name(), seen_key, key));
    }
    CA_ASSIGN_OR_RETURN(const double rotary, rope.number("partial_rotary_factor", 0.0, 1.0, 1.0));
    if (rotary != 1.0) return rope.not_implemented("partial_rotary_factor", rotary, "1.0");
    config.rope_theta = theta;
    config.rope_scaling = scaling;
    seen_key = key;
  }
  CA_ASSIGN_OR_RETURN(const double rotary, root.number("partial_rotary_factor", 0.0, 1.0, 1.0));
  if (rotary != 1.0) return root.not_implemented("partial_rotary_factor", rotary, "1.0");
  return {};
}

// Features that change the computation and would be ignored silently otherwise.
Status refuse_unimplemented(const Section& root) {
  for (const char* key : {"quantization_config", "compression_config"}) {
    if (const Json* seen = root.find(key)) {
      const Json* method = seen->is_object() && seen->contains("quant_method") ? &(*seen)["quant_method"] : seen;
      return root.not_implemented(key, *method, "absent; use an unquantized checkpoint");
    }
  }
  for (const char* key : {"attention_bias", "mlp_bias", "use_sliding_window"}) {
    CA_ASSIGN_OR_RETURN(const bool enabled, root.boolean(key, false));
    if (enabled) return root.not_implemented(key, true, "false");
  }
  CA_ASSIGN_OR_RETURN(const std::string* const activation, root.text("hidden_act", "\"silu\""));
  if (activation && *activation != "silu") return root.not_implemented("hidden_act", *activation, "\"silu\"");

  if (const Json* layer_types = root.find("layer_types")) {
    if (!layer_types->is_array()) return root.refused("layer_types", *layer_types, "a list of \"full_attention\"");
    for (const Json& type : *layer_types) {
      if (type != "full_attention") return root.not_implemented("layer_types", type, "a list of \"full_attention\"");
    }
  }
  return {};
}

Status read_sizes(const Section& root, ModelConfig& config) {
  CA_ASSIGN_OR_RETURN(config.vocab_size, root.integer("vocab_size", 1, kMaxVocab));
  CA_ASSIGN_OR_RETURN(config.hidden_size, root.integer("hidden_size", 1, kMaxHidden));
  CA_ASSIGN_OR_RETURN(config.intermediate_size, root.integer("intermediate_size", 1, kMaxIntermediate));
  CA_ASSIGN_OR_RETURN(config.num_hidden_layers, root.integer("num_hidden_layers", 1, kMaxLayers));
  CA_ASSIGN_OR_RETURN(config.num_attention_heads, root.integer("num_attention_heads", 1, kMaxHeads));
  const std::int32_t num_heads = config.num_attention_heads;
  CA_ASSIGN_OR_RETURN(config.num_key_value_heads, root.integer("num_key_value_heads", 1, num_heads, num_heads));
  if (num_heads % config.num_key_value_heads != 0) {
    return root.refused("num_key_value_heads", config.num_key_value_heads,
                        fmt::format("a divisor of num_attention_heads, {}", num_heads));
  }

  // Llama derives an absent head_dim from hidden_size. Qwen3's heads are wider than that, so there a file without
  // it is incomplete.
  if (config.architecture == Architecture::kLlama && !root.find("head_dim")) {
    config.head_dim = config.hidden_size / num_heads;
    if (config.hidden_size % num_heads != 0 || config.head_dim % 2 != 0 || config.head_dim > kMaxHeadDim) {
      return root.refused("hidden_size", config.hidden_size,
                          fmt::format("without head_dim, a multiple of num_attention_heads, {}, that gives heads of "
                                      "an even dimension up to {}",
                                      num_heads, kMaxHeadDim));
    }
  } else {
    CA_ASSIGN_OR_RETURN(config.head_dim, root.integer("head_dim", 2, kMaxHeadDim));
    if (config.head_dim % 2 != 0) {
      return root.refused("head_dim", config.head_dim, "an even integer, since RoPE rotates pairs");
    }
  }

  CA_ASSIGN_OR_RETURN(config.max_position_embeddings, root.integer("max_position_embeddings", 1, kMaxPositions));
  CA_ASSIGN_OR_RETURN(config.rms_norm_eps, root.number("rms_norm_eps", 0.0, 0.1));
  return {};
}

Result<ExpertConfig> read_experts(const Section& root, std::int32_t num_layers) {
  ExpertConfig experts;
  // transformers 5 writes "num_local_experts", 4 wrote "num_experts".
  const bool is_new = root.find("num_experts") == nullptr && root.find("num_local_experts") != nullptr;
  CA_ASSIGN_OR_RETURN(experts.num_experts, root.integer(is_new ? "num_local_experts" : "num_experts", 1, kMaxExperts));
  CA_ASSIGN_OR_RETURN(const std::int32_t same, root.integer("num_local_experts", 1, kMaxExperts, experts.num_experts));
  if (same != experts.num_experts) {
    return io_error(fmt::format("{}: num_experts {} and num_local_experts {} contradict each other", root.file_name(),
                                experts.num_experts, same));
  }
  CA_ASSIGN_OR_RETURN(experts.experts_per_token, root.integer("num_experts_per_tok", 1, experts.num_experts));
  CA_ASSIGN_OR_RETURN(experts.intermediate_size, root.integer("moe_intermediate_size", 1, kMaxIntermediate));
  CA_ASSIGN_OR_RETURN(experts.normalize_weights, root.boolean("norm_topk_prob", false));
  CA_ASSIGN_OR_RETURN(experts.every, root.integer("decoder_sparse_step", 1, kMaxLayers, 1));
  CA_ASSIGN_OR_RETURN(experts.mlp_only_layers, root.integers("mlp_only_layers", 0, num_layers - 1));
  return experts;
}

Result<std::optional<std::int32_t>> read_bos(const Section& root, std::int32_t vocab_size) {
  CA_ASSIGN_OR_RETURN(const std::int32_t bos, root.integer("bos_token_id", 0, vocab_size - 1, -1));
  return bos < 0 ? std::optional<std::int32_t>() : bos;
}

std::string_view text_of(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

}  // namespace

const char* architecture_name(Architecture architecture) noexcept {
  for (const auto& known : kKnownArchitectures) {
    if (known.architecture == architecture) return known.name;
  }
  return "?";
}

bool ModelConfig::has_experts(std::int32_t layer) const noexcept {
  const std::vector<std::int32_t>& without = experts.mlp_only_layers;
  return experts.num_experts > 0 && (layer + 1) % experts.every == 0 &&
         std::find(without.begin(), without.end(), layer) == without.end();
}

Result<ModelConfig> parse_model_config(std::string_view json, std::string_view file_name) {
  CA_ASSIGN_OR_RETURN(const Json object, parse_json_object(json, file_name));
  const Section root(object, file_name);
  ModelConfig config;

  CA_ASSIGN_OR_RETURN(config.architecture, read_architecture(root));
  config.qk_norm = config.architecture != Architecture::kLlama;
  CA_RETURN_IF_ERROR(refuse_unimplemented(root));
  CA_RETURN_IF_ERROR(read_sizes(root, config));
  if (config.architecture == Architecture::kQwen3Moe) {
    CA_ASSIGN_OR_RETURN(config.experts, read_experts(root, config.num_hidden_layers));
  }
  CA_RETURN_IF_ERROR(read_rope(root, config));
  CA_ASSIGN_OR_RETURN(config.tie_word_embeddings, root.boolean("tie_word_embeddings", false));
  CA_ASSIGN_OR_RETURN(config.dtype, read_dtype(root));
  CA_ASSIGN_OR_RETURN(config.bos_token_id, read_bos(root, config.vocab_size));
  CA_ASSIGN_OR_RETURN(config.eos_token_ids, root.token_ids("eos_token_id", config.vocab_size));
  return config;
}

Status apply_generation_config(std::string_view json, std::string_view file_name, ModelConfig& config) {
  CA_ASSIGN_OR_RETURN(const Json object, parse_json_object(json, file_name));
  const Section root(object, file_name);
  CA_ASSIGN_OR_RETURN(const std::optional<std::int32_t> bos, read_bos(root, config.vocab_size));
  CA_ASSIGN_OR_RETURN(std::vector<std::int32_t> ids, root.token_ids("eos_token_id", config.vocab_size));
  for (std::int32_t id : config.eos_token_ids) {
    if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
  config.eos_token_ids = std::move(ids);
  if (!config.bos_token_id) config.bos_token_id = bos;
  return {};
}

Result<ModelConfig> load_model_config(const std::filesystem::path& directory) {
  CA_ASSIGN_OR_RETURN(const MappedFile config_file, MappedFile::open(directory / "config.json"));
  CA_ASSIGN_OR_RETURN(ModelConfig config, parse_model_config(text_of(config_file), config_file.path()));

  const std::filesystem::path generation_path = directory / "generation_config.json";
  std::error_code ignored;
  if (std::filesystem::exists(generation_path, ignored)) {
    CA_ASSIGN_OR_RETURN(const MappedFile generation_file, MappedFile::open(generation_path));
    CA_RETURN_IF_ERROR(apply_generation_config(text_of(generation_file), generation_file.path(), config));
  }
  return config;
}

}  // namespace compact::engine
