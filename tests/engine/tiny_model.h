/// What the engine tests share: the tiny checkpoints of tests/golden and one run through a prompt.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "compact/paged_kv.h"
#include "engine/loader/safetensors.h"
#include "engine/model/chunk_attention.h"
#include "engine/model/transformer.h"

namespace compact::engine {

inline const std::filesystem::path kSourceDir = COMPACT_SOURCE_DIR;
inline const std::filesystem::path kGoldenDir = kSourceDir / "tests" / "golden";
inline const std::filesystem::path kDemoDir = kSourceDir / "assets" / "demo";

template <class T>
std::vector<T> read_tensor(const SafetensorsFile& file, const char* name) {
  const TensorInfo* tensor = file.find(name);
  if (tensor == nullptr) {
    ADD_FAILURE() << file.path() << " has no tensor " << name;
    return {};
  }
  std::vector<T> values(tensor->bytes.size() / sizeof(T));
  std::memcpy(values.data(), tensor->bytes.data(), tensor->bytes.size());
  return values;
}

/// Logits of every position of a prompt, run in chunks of the given size: [n, vocab].
inline std::vector<float> run_prompt(const Transformer& model, std::span<const std::int32_t> tokens,
                                     std::int32_t chunk_tokens, const SparsityOptions& sparsity, ThreadPool& pool,
                                     std::int32_t page_tokens = 128) {
  const ModelConfig& config = model.config();
  auto attention = ChunkAttention::create(sparsity, config.num_hidden_layers, config.num_attention_heads,
                                          config.num_key_value_heads, model.softmax_scale());
  EXPECT_TRUE(attention.ok()) << attention.status().message();
  PagedKvOptions options;
  options.num_layers = config.num_hidden_layers;
  options.num_kv_heads = config.num_key_value_heads;
  options.head_dim = config.head_dim;
  options.page_tokens = page_tokens;
  options.num_pages = static_cast<std::int32_t>(tokens.size()) / page_tokens + 1;
  auto cache = PagedKvCache::create(options);
  EXPECT_TRUE(cache.ok()) << cache.status().message();
  const RequestId request = cache->add_request();
  std::vector<float> all;
  std::vector<float> logits;
  for (std::size_t begin = 0; begin < tokens.size(); begin += static_cast<std::size_t>(chunk_tokens)) {
    const auto chunk = tokens.subspan(begin, std::min(tokens.size() - begin, static_cast<std::size_t>(chunk_tokens)));
    const Status status = model.forward(chunk, request, false, LogitsOf::kAllTokens, *cache, *attention, pool, logits);
    EXPECT_TRUE(status.ok()) << status.message();
    all.insert(all.end(), logits.begin(), logits.end());
  }
  return all;
}

}  // namespace compact::engine
