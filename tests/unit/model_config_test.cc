#include "engine/loader/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "tests/unit/temp_dir.h"

namespace compact::engine {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Json = nlohmann::json;
using testing::TempDir;

// Llama-3.1-8B-Instruct as published, in the words of transformers 4.
const char* const kLlama31 = R"({
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
  "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
  "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 128256})";

// Qwen3-0.6B in the words of transformers 5.
const char* const kQwen3 = R"({
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "bos_token_id": 151643, "dtype": "bfloat16",
  "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
  "layer_types": ["full_attention", "full_attention"], "max_position_embeddings": 40960, "max_window_layers": 28,
  "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
  "pad_token_id": null, "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
  "sliding_window": null, "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936})";

// Qwen3-30B-A3B as published.
const char* const kQwen3Moe = R"({
  "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "bos_token_id": 151643, "decoder_sparse_step": 1,
  "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
  "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
  "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128,
  "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false,
  "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
  "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_sliding_window": false,
  "vocab_size": 151936})";

Result<ModelConfig> parse(const Json& json) { return parse_model_config(json.dump(), "config.json"); }

// The Llama config with the members of `patch` in place of its own; null removes one.
Json llama_with(const char* patch) {
  Json json = Json::parse(kLlama31);
  json.merge_patch(Json::parse(patch));
  return json;
}

Json qwen_with(const char* patch) {
  Json json = Json::parse(kQwen3);
  json.merge_patch(Json::parse(patch));
  return json;
}

TEST(ModelConfig, ReadsLlama31) {
  const auto config = parse_model_config(kLlama31, "config.json");
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(config->architecture, Architecture::kLlama);
  EXPECT_STREQ(architecture_name(config->architecture), "LlamaForCausalLM");
  EXPECT_EQ(config->vocab_size, 128256);
  EXPECT_EQ(config->hidden_size, 4096);
  EXPECT_EQ(config->intermediate_size, 14336);
  EXPECT_EQ(config->num_hidden_layers, 32);
  EXPECT_EQ(config->num_attention_heads, 32);
  EXPECT_EQ(config->num_key_value_heads, 8);
  EXPECT_EQ(config->head_dim, 128);
  EXPECT_EQ(config->max_position_embeddings, 131072);
  EXPECT_EQ(config->rms_norm_eps, 1e-5);
  EXPECT_EQ(config->rope_theta, 500000.0);
  EXPECT_EQ(config->rope_scaling, (RopeScaling{.kind = RopeScaling::Kind::kLlama3,
                                               .factor = 8.0,
                                               .low_freq_factor = 1.0,
                                               .high_freq_factor = 4.0,
                                               .original_max_position_embeddings = 8192}));
  EXPECT_FALSE(config->tie_word_embeddings);
  EXPECT_FALSE(config->qk_norm);
  EXPECT_EQ(config->dtype, DataType::kBF16);
  EXPECT_EQ(config->bos_token_id, 128000);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(128001, 128008, 128009));
}

TEST(ModelConfig, ReadsQwen3) {
  const auto config = parse_model_config(kQwen3, "config.json");
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(config->architecture, Architecture::kQwen3);
  EXPECT_EQ(config->head_dim, 128);  // Hq * D = 2048, twice the hidden size
  EXPECT_TRUE(config->qk_norm);
  EXPECT_TRUE(config->tie_word_embeddings);
  EXPECT_EQ(config->rope_theta, 1e6);
  EXPECT_EQ(config->rope_scaling.kind, RopeScaling::Kind::kNone);
  EXPECT_EQ(config->dtype, DataType::kBF16);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(151645));
}

Json moe_with(const char* patch) {
  Json json = Json::parse(kQwen3Moe);
  json.merge_patch(Json::parse(patch));
  return json;
}

TEST(ModelConfig, ReadsQwen3Moe) {
  const auto config = parse_model_config(kQwen3Moe, "config.json");
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(config->architecture, Architecture::kQwen3Moe);
  EXPECT_TRUE(config->qk_norm);
  EXPECT_EQ(config->experts.num_experts, 128);
  EXPECT_EQ(config->experts.experts_per_token, 8);
  EXPECT_EQ(config->experts.intermediate_size, 768);
  EXPECT_TRUE(config->experts.normalize_weights);
  for (const std::int32_t layer : {0, 1, 47}) EXPECT_TRUE(config->has_experts(layer));
  EXPECT_FALSE(parse_model_config(kQwen3, "config.json")->has_experts(0));
  const auto new_words = parse(moe_with(R"({"num_experts": null, "num_local_experts": 128})"));
  ASSERT_TRUE(new_words.ok()) << new_words.status().message();
  EXPECT_EQ(new_words->experts.num_experts, 128);
}

TEST(ModelConfig, SomeLayersOfAMixtureHaveAnMlp) {
  const auto config = parse(moe_with(
      R"({"decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": null, "num_hidden_layers": 8})"));
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_FALSE(config->experts.normalize_weights);
  std::vector<std::int32_t> with;
  for (std::int32_t layer = 0; layer < 8; ++layer) {
    if (config->has_experts(layer)) with.push_back(layer);
  }
  EXPECT_THAT(with, ElementsAre(1, 5, 7));
}

TEST(ModelConfig, NamesWhatIsWrongWithExperts) {
  const std::pair<const char*, std::vector<std::string>> cases[] = {
      {R"({"num_experts": null})", {"num_experts is missing", "an integer from 1 to 4096"}},
      {R"({"num_experts": 0})", {"num_experts is 0"}},
      {R"({"num_experts": null, "num_local_experts": 5000})", {"num_local_experts is 5000", "from 1 to 4096"}},
      {R"({"num_local_experts": 64})", {"num_experts 128 and num_local_experts 64 contradict"}},
      {R"({"num_experts_per_tok": null})", {"num_experts_per_tok is missing"}},
      {R"({"num_experts_per_tok": 129})", {"num_experts_per_tok is 129", "from 1 to 128"}},
      {R"({"moe_intermediate_size": "768"})", {"moe_intermediate_size is \"768\""}},
      {R"({"norm_topk_prob": 1})", {"norm_topk_prob is 1", "true or false"}},
      {R"({"decoder_sparse_step": 0})", {"decoder_sparse_step is 0"}},
      {R"({"mlp_only_layers": 3})", {"mlp_only_layers is 3", "a list of integers from 0 to 47"}},
      {R"({"mlp_only_layers": [48]})", {"mlp_only_layers contains 48"}},
      {R"({"mlp_only_layers": [1.5]})", {"mlp_only_layers contains 1.5"}},
  };
  for (const auto& [patch, words] : cases) {
    const auto config = parse(moe_with(patch));
    ASSERT_FALSE(config.ok()) << patch;
    EXPECT_EQ(config.status().code(), StatusCode::kIoError) << patch;
    for (const auto& word : words) EXPECT_THAT(config.status().message(), HasSubstr(word)) << patch;
  }
}

TEST(ModelConfig, OldAndNewWordsMeanTheSame) {
  const auto old_words = parse_model_config(kLlama31, "config.json");
  const auto new_words = parse(llama_with(R"({
    "rope_theta": null, "rope_scaling": null, "torch_dtype": null, "dtype": "bfloat16", "head_dim": 128,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}})"));
  ASSERT_TRUE(old_words.ok() && new_words.ok()) << new_words.status().message();
  EXPECT_EQ(new_words->rope_theta, old_words->rope_theta);
  EXPECT_EQ(new_words->rope_scaling, old_words->rope_scaling);
  EXPECT_EQ(new_words->dtype, old_words->dtype);
  EXPECT_EQ(new_words->head_dim, old_words->head_dim);
}

TEST(ModelConfig, DefaultsOfLlama2) {
  const auto config = parse(llama_with(R"({
    "num_key_value_heads": null, "rope_theta": null, "rope_scaling": null, "torch_dtype": null,
    "tie_word_embeddings": null, "bos_token_id": null, "eos_token_id": null, "hidden_act": null})"));
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(config->num_key_value_heads, 32);
  EXPECT_EQ(config->rope_theta, 10000.0);
  EXPECT_EQ(config->rope_scaling.kind, RopeScaling::Kind::kNone);
  EXPECT_FALSE(config->tie_word_embeddings);
  EXPECT_FALSE(config->dtype.has_value());
  EXPECT_FALSE(config->bos_token_id.has_value());
  EXPECT_THAT(config->eos_token_ids, IsEmpty());
}

TEST(ModelConfig, RopeScalingVariants) {
  // "type" is the older spelling of "rope_type".
  const auto linear = parse(llama_with(R"({"rope_scaling": {"rope_type": null, "type": "linear", "factor": 4}})"));
  ASSERT_TRUE(linear.ok()) << linear.status().message();
  EXPECT_EQ(linear->rope_scaling, (RopeScaling{.kind = RopeScaling::Kind::kLinear, .factor = 4.0}));

  const auto plain = parse(llama_with(R"({"rope_scaling": {"rope_type": "default"}})"));
  ASSERT_TRUE(plain.ok()) << plain.status().message();
  EXPECT_EQ(plain->rope_scaling, RopeScaling{});

  // transformers falls back to max_position_embeddings.
  const auto original = parse(llama_with(R"({"rope_scaling": {"original_max_position_embeddings": null}})"));
  ASSERT_TRUE(original.ok()) << original.status().message();
  EXPECT_EQ(original->rope_scaling.original_max_position_embeddings, 131072);
}

// A patch and what its message has to say.
struct Refusal {
  const char* patch;
  std::vector<std::string> words;
};

TEST(ModelConfig, NamesWhatIsNotImplemented) {
  const Refusal llama[] = {
      {R"({"architectures": ["MambaForCausalLM"]})",
       {"unknown architecture \"MambaForCausalLM\"", "LlamaForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM"}},
      {R"({"rope_scaling": {"rope_type": "dynamic"}})", {"rope_scaling.rope_type is \"dynamic\"", "\"linear\""}},
      {R"({"rope_scaling": {"rope_type": "longrope"}})", {"rope_scaling.rope_type is \"longrope\""}},
      {R"({"rope_scaling": {"rope_type": null, "type": "su"}})", {"rope_scaling.type is \"su\""}},
      {R"({"rope_scaling": {"partial_rotary_factor": 0.5}})", {"rope_scaling.partial_rotary_factor is 0.5"}},
      {R"({"partial_rotary_factor": 0.25})", {"partial_rotary_factor is 0.25"}},
      {R"({"original_max_position_embeddings": 4096})", {"original_max_position_embeddings is 4096"}},
      {R"({"attention_bias": true})", {"attention_bias is true", "allowed: false"}},
      {R"({"mlp_bias": true})", {"mlp_bias is true"}},
      {R"({"hidden_act": "gelu"})", {"hidden_act is \"gelu\"", "\"silu\""}},
      {R"({"quantization_config": {"quant_method": "awq"}})", {"quantization_config is \"awq\"", "unquantized"}},
      {R"({"quantization_config": {}})", {"quantization_config is an object"}},
      {R"({"torch_dtype": "float64"})", {"torch_dtype is \"float64\"", "\"bfloat16\""}},
  };
  for (const auto& [patch, words] : llama) {
    const auto config = parse(llama_with(patch));
    ASSERT_FALSE(config.ok()) << patch;
    EXPECT_EQ(config.status().code(), StatusCode::kUnsupported) << patch;
    EXPECT_THAT(config.status().message(), HasSubstr("config.json: ")) << patch;
    for (const auto& word : words) EXPECT_THAT(config.status().message(), HasSubstr(word)) << patch;
  }
  const Refusal qwen[] = {
      {R"({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})", {"rope_scaling.rope_type is \"yarn\""}},
      {R"({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}})", {"rope_parameters.rope_type is \"yarn\""}},
      {R"({"use_sliding_window": true})", {"use_sliding_window is true"}},
      {R"({"layer_types": ["full_attention", "sliding_attention"]})", {"layer_types is \"sliding_attention\""}},
  };
  for (const auto& [patch, words] : qwen) {
    const auto config = parse(qwen_with(patch));
    ASSERT_FALSE(config.ok()) << patch;
    EXPECT_EQ(config.status().code(), StatusCode::kUnsupported) << patch;
    for (const auto& word : words) EXPECT_THAT(config.status().message(), HasSubstr(word)) << patch;
  }
}

TEST(ModelConfig, NamesKeySeenValueAndWhatIsAllowed) {
  const Refusal cases[] = {
      {R"({"architectures": null})", {"architectures is missing", "LlamaForCausalLM"}},
      {R"({"architectures": "LlamaForCausalLM"})", {"architectures is \"LlamaForCausalLM\"", "a list"}},
      {R"({"architectures": []})", {"architectures is an array of 0 elements"}},
      {R"({"architectures": ["LlamaForCausalLM", "X"]})", {"an array of 2 elements"}},
      {R"({"architectures": [3]})", {"architectures is an array of 1"}},
      {R"({"vocab_size": null})", {"vocab_size is missing", "an integer from 1 to 16777216"}},
      {R"({"vocab_size": "32000"})", {"vocab_size is \"32000\"", "an integer from 1"}},
      {R"({"vocab_size": true})", {"vocab_size is true"}},
      {R"({"vocab_size": 0})", {"vocab_size is 0"}},
      {R"({"hidden_size": -4096})", {"hidden_size is -4096"}},
      {R"({"hidden_size": 4096.0})", {"hidden_size is 4096.0"}},
      {R"({"hidden_size": 4294967296})", {"hidden_size is 4294967296"}},
      {R"({"hidden_size": 18446744073709551615})", {"hidden_size is 18446744073709551615"}},
      {R"({"hidden_size": [4096]})", {"hidden_size is an array of 1"}},
      {R"({"hidden_size": 4100})", {"hidden_size is 4100", "multiple of num_attention_heads, 32"}},
      {R"({"hidden_size": 32})", {"hidden_size is 32", "even dimension"}},
      {R"({"intermediate_size": {}})", {"intermediate_size is an object of 0 members"}},
      {R"({"num_hidden_layers": 2000})", {"num_hidden_layers is 2000", "from 1 to 1024"}},
      {R"({"num_attention_heads": 0})", {"num_attention_heads is 0"}},
      {R"({"num_key_value_heads": 5})", {"num_key_value_heads is 5", "a divisor of num_attention_heads, 32"}},
      {R"({"num_key_value_heads": 64})", {"num_key_value_heads is 64", "from 1 to 32"}},
      {R"({"head_dim": 127})", {"head_dim is 127", "even"}},
      {R"({"head_dim": 8192})", {"head_dim is 8192", "from 2 to 4096"}},
      {R"({"max_position_embeddings": null})", {"max_position_embeddings is missing"}},
      {R"({"rms_norm_eps": 0})", {"rms_norm_eps is 0", "a number above 0"}},
      {R"({"rms_norm_eps": "1e-5"})", {"rms_norm_eps is \"1e-5\"", "a number above 0"}},
      {R"({"rope_theta": 1.0})", {"rope_theta is 1.0", "above 1"}},
      {R"({"rope_theta": 1e300})", {"rope_theta is 1e+300"}},
      {R"({"rope_theta": "big"})", {"rope_theta is \"big\""}},
      {R"({"rope_scaling": "llama3"})", {"rope_scaling is \"llama3\"", "an object"}},
      {R"({"rope_scaling": {"rope_type": 3}})", {"rope_scaling.rope_type is 3", "\"llama3\""}},
      {R"({"rope_scaling": {"factor": null}})", {"rope_scaling.factor is missing"}},
      {R"({"rope_scaling": {"factor": 0}})", {"rope_scaling.factor is 0"}},
      {R"({"rope_scaling": {"factor": -8}})", {"rope_scaling.factor is -8"}},
      {R"({"rope_scaling": {"low_freq_factor": null}})", {"rope_scaling.low_freq_factor is missing"}},
      {R"({"rope_scaling": {"high_freq_factor": 1.0}})", {"high_freq_factor is 1.0", "above low_freq_factor, 1"}},
      {R"({"rope_scaling": {"original_max_position_embeddings": 0}})", {"original_max_position_embeddings is 0"}},
      {R"({"rope_scaling": {"type": "linear"}})", {"rope_type \"llama3\"", "type \"linear\"", "contradict"}},
      {R"({"rope_scaling": {"rope_theta": 10000}})",
       {"rope_theta 500000", "rope_scaling.rope_theta 10000", "contradict"}},
      {R"({"rope_parameters": {"rope_type": "default"}})", {"rope_parameters and rope_scaling contradict"}},
      {R"({"dtype": "float32"})", {"dtype and torch_dtype contradict"}},
      {R"({"torch_dtype": 16})", {"torch_dtype is 16"}},
      {R"({"attention_bias": "no"})", {"attention_bias is \"no\"", "true or false"}},
      {R"({"tie_word_embeddings": 1})", {"tie_word_embeddings is 1", "true or false"}},
      {R"({"layer_types": "full_attention"})", {"layer_types is \"full_attention\""}},
      {R"({"bos_token_id": 128256})", {"bos_token_id is 128256", "from 0 to 128255"}},
      {R"({"eos_token_id": -1})", {"eos_token_id is -1", "a token id from 0 to 128255"}},
      {R"({"eos_token_id": [128001, "x"]})", {"eos_token_id contains \"x\""}},
      {R"({"eos_token_id": [128001, 128256]})", {"eos_token_id contains 128256"}},
  };
  for (const auto& [patch, words] : cases) {
    const auto config = parse(llama_with(patch));
    ASSERT_FALSE(config.ok()) << patch;
    EXPECT_EQ(config.status().code(), StatusCode::kIoError) << patch;
    EXPECT_THAT(config.status().message(), HasSubstr("config.json: ")) << patch;
    for (const auto& word : words) EXPECT_THAT(config.status().message(), HasSubstr(word)) << patch;
  }
}

TEST(ModelConfig, Qwen3NeedsAnExplicitHeadDim) {
  const auto config = parse(qwen_with(R"({"head_dim": null})"));
  ASSERT_FALSE(config.ok());
  EXPECT_THAT(config.status().message(), HasSubstr("head_dim is missing"));
}

TEST(ModelConfig, RefusesTextThatIsNoConfig) {
  const std::pair<std::string, std::string> cases[] = {
      {"", "not valid JSON"},
      {"{\"a\": \n nul}", "line 2"},
      {"[1]", "the top level is an array"},
      {"{\"vocab_size\": 1, \"vocab_size\": 2}", "\"vocab_size\" appears twice"},
      {"{\"rms_norm_eps\": 1e999}", "not valid JSON"},
      {"{\"rope_theta\": NaN}", "not valid JSON"},
      {"{\"a\": \"\xff\"}", "not valid JSON"},
      {"{\"a\":" + std::string(1'000'000, '['), "deeper than 64"},
  };
  for (const auto& [text, reason] : cases) {
    const auto config = parse_model_config(text, "config.json");
    ASSERT_FALSE(config.ok()) << text.substr(0, 60);
    EXPECT_EQ(config.status().code(), StatusCode::kIoError);
    EXPECT_THAT(config.status().message(), AllOf(HasSubstr("config.json: "), HasSubstr(reason)));
    EXPECT_LT(config.status().message().size(), 400u);
  }
}

TEST(ModelConfig, LoadsADirectoryAndItsGenerationConfig) {
  const TempDir dir;
  auto config = load_model_config(dir.path());
  ASSERT_FALSE(config.ok());
  EXPECT_THAT(config.status().message(), AllOf(HasSubstr("config.json"), HasSubstr("No such file")));

  dir.write("config.json", kQwen3);
  config = load_model_config(dir.path());
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_THAT(config->eos_token_ids, ElementsAre(151645));

  dir.write("generation_config.json", R"({"bos_token_id": 5, "eos_token_id": [151643, 151645], "temperature": 0.6})");
  config = load_model_config(dir.path());
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_THAT(config->eos_token_ids, ElementsAre(151643, 151645));
  EXPECT_EQ(config->bos_token_id, 151643);  // config.json has one

  dir.write("generation_config.json", R"({"eos_token_id": 7})");
  config = load_model_config(dir.path());
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_THAT(config->eos_token_ids, ElementsAre(7, 151645));

  dir.write("generation_config.json", R"({"eos_token_id": "x"})");
  config = load_model_config(dir.path());
  ASSERT_FALSE(config.ok());
  EXPECT_THAT(config.status().message(),
              AllOf(HasSubstr("generation_config.json"), HasSubstr("eos_token_id is \"x\"")));

  dir.write("generation_config.json", "");
  EXPECT_FALSE(load_model_config(dir.path()).ok());
}

}  // namespace
}  // namespace compact::engine
