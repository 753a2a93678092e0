// Fuzz target: any text as config.json, generation_config.json and model.safetensors.index.json. A config that is
// accepted has to be one that the engine can size its buffers from.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "engine/loader/checkpoint.h"
#include "engine/loader/model_config.h"
#include "engine/loader/rope_frequencies.h"

namespace {

using compact::Status;
using compact::StatusCode;
using compact::engine::ModelConfig;

void require(bool condition) {
  if (!condition) std::abort();
}

void check_status(const Status& status) {
  require(!status.message().empty() && status.message().size() < 2000);
  require(status.code() == StatusCode::kIoError || status.code() == StatusCode::kUnsupported);
}

void check_config(const ModelConfig& config) {
  require(config.vocab_size > 0 && config.hidden_size > 0 && config.intermediate_size > 0);
  require(config.num_hidden_layers > 0 && config.max_position_embeddings > 0);
  require(config.num_key_value_heads > 0 && config.num_attention_heads % config.num_key_value_heads == 0);
  require(config.head_dim > 0 && config.head_dim % 2 == 0);
  require(config.rms_norm_eps > 0);
  std::int32_t projection = 0;
  require(!__builtin_mul_overflow(config.num_attention_heads, config.head_dim, &projection));
  for (std::int32_t id : config.eos_token_ids) require(id >= 0 && id < config.vocab_size);

  const auto frequencies = compact::engine::rope_inverse_frequencies(config);
  require(frequencies.size() == static_cast<std::size_t>(config.head_dim / 2));
  for (float frequency : frequencies) require(std::isfinite(frequency) && frequency > 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);

  auto config = compact::engine::parse_model_config(text, "config.json");
  if (config.ok()) {
    check_config(config.value());
  } else {
    check_status(config.status());
  }

  ModelConfig base;
  base.vocab_size = 1000;
  base.eos_token_ids = {2};
  const Status status = compact::engine::apply_generation_config(text, "generation_config.json", base);
  if (!status.ok()) check_status(status);
  require(!base.eos_token_ids.empty());

  const auto shards = compact::engine::parse_shard_index(text, "model.safetensors.index.json");
  if (shards.ok()) {
    for (const auto& [tensor, shard] : *shards) require(shard.find('/') == std::string::npos && shard[0] != '.');
  } else {
    check_status(shards.status());
  }
  return 0;
}
