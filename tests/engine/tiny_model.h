/// What the engine tests share: the tiny checkpoints of tests/golden and one run through a prompt.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "engine/loader/safetensors.h"
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
  BatchOptions options;
  options.max_step_tokens = chunk_tokens;
  options.page_tokens = page_tokens;
  options.num_pages = static_cast<std::int32_t>(tokens.size()) / page_tokens + 1;
  options.sparsity = sparsity;
  auto sequence = Sequence::create(model, options);
  std::vector<float> all;
  std::vector<float> logits;
  if (!sequence.ok()) {
    ADD_FAILURE() << sequence.status().message();
    return all;
  }
  for (std::size_t begin = 0; begin < tokens.size(); begin += static_cast<std::size_t>(chunk_tokens)) {
    const auto chunk = tokens.subspan(begin, std::min(tokens.size() - begin, static_cast<std::size_t>(chunk_tokens)));
    const Status status = sequence->forward(chunk, false, LogitsOf::kAllTokens, pool, logits);
    EXPECT_TRUE(status.ok()) << status.message();
    all.insert(all.end(), logits.begin(), logits.end());
  }
  return all;
}

}  // namespace compact::engine
