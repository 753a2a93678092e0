/// What config.json says about a model, checked: the one place that knows Hugging Face's key names.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string_view>
#include <vector>

#include "compact/status.h"
#include "engine/loader/data_type.h"

namespace compact::engine {

enum class Architecture : std::uint8_t {
  kLlama,     // LlamaForCausalLM: Llama 2, 3, 3.1, 3.2, 3.3
  kQwen3,     // Qwen3ForCausalLM: as Llama, with RMSNorm over each query and key head
  kQwen3Moe,  // Qwen3MoeForCausalLM: as Qwen3, with a mixture of experts in place of the MLP
};

/// Name as config.json writes it, e.g. "LlamaForCausalLM". Static storage.
[[nodiscard]] const char* architecture_name(Architecture architecture) noexcept;

struct RopeScaling {
  enum class Kind : std::uint8_t {
    kNone,
    kLinear,  // every frequency divided by factor
    kLlama3,  // long wavelengths divided by factor, short ones kept, a smooth passage between
  };
  Kind kind = Kind::kNone;
  double factor = 1.0;
  // kLlama3 only: wavelengths beyond original_max / low_freq_factor are long, below original_max / high_freq_factor
  // short.
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  std::int32_t original_max_position_embeddings = 0;  // tokens

  friend bool operator==(const RopeScaling&, const RopeScaling&) = default;
};

/// A mixture of experts in place of an MLP: a router scores the experts, each token runs through the best of them.
struct ExpertConfig {
  std::int32_t num_experts = 0;        // E; 0: the model has none
  std::int32_t experts_per_token = 0;  // K, at most E
  std::int32_t intermediate_size = 0;  // of one expert
  bool normalize_weights = false;      // the weights of a token's K experts add up to 1
  // A layer has experts if its number, counted from 1, is a multiple of `every` and it is not among mlp_only_layers.
  std::int32_t every = 1;
  std::vector<std::int32_t> mlp_only_layers{};  // counted from 0
};

struct ModelConfig {
  Architecture architecture = Architecture::kLlama;
  std::int32_t vocab_size = 0;
  std::int32_t hidden_size = 0;
  std::int32_t intermediate_size = 0;
  std::int32_t num_hidden_layers = 0;
  std::int32_t num_attention_heads = 0;      // Hq
  std::int32_t num_key_value_heads = 0;      // Hkv; divides Hq
  std::int32_t head_dim = 0;                 // D; even; Hq * D may differ from hidden_size
  std::int32_t max_position_embeddings = 0;  // tokens the model was made for
  double rms_norm_eps = 0.0;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  bool tie_word_embeddings = false;  // the output projection is the embedding table
  bool qk_norm = false;
  ExpertConfig experts;
  std::optional<DataType> dtype;             // type the weights were saved in, if stated: F32, BF16 or F16
  std::optional<std::int32_t> bos_token_id;  // in [0, vocab_size)
  std::vector<std::int32_t> eos_token_ids;   // each ends generation; no duplicates, may be empty

  /// Whether this layer has experts in place of an MLP of intermediate_size.
  [[nodiscard]] bool has_experts(std::int32_t layer) const noexcept;
};

/// Reads the text of config.json, of transformers 4 (rope_theta, rope_scaling, torch_dtype) or 5 (rope_parameters,
/// dtype). A null counts as absent. `file_name` is used in messages only.
///
/// Errors: kIoError for a missing key, a wrong type or a value out of range, with the key, the value seen and what is
/// allowed; kUnsupported for a model that is valid but not implemented, with the key that says so.
[[nodiscard]] Result<ModelConfig> parse_model_config(std::string_view json, std::string_view file_name);

/// Adds what generation_config.json says: its end tokens first, then those `config` already had; its bos_token_id if
/// `config` has none. Chat models list end-of-turn tokens only there. Errors: kIoError, as above.
[[nodiscard]] Status apply_generation_config(std::string_view json, std::string_view file_name, ModelConfig& config);

/// config.json of a model directory, with generation_config.json where there is one.
/// Errors: those of the two, and kIoError for a file that cannot be read.
[[nodiscard]] Result<ModelConfig> load_model_config(const std::filesystem::path& directory);

}  // namespace compact::engine
