// Logits against transformers (tests/golden/make_model_goldens.py), in chunks of several sizes.
#include <algorithm>
#include <cmath>
#include <ostream>

#include "tests/engine/tiny_model.h"

namespace compact::engine {
namespace {

struct GoldenCase {
  std::filesystem::path model;
  std::filesystem::path logits;
  std::vector<std::int32_t> chunk_sizes;
};

void PrintTo(const GoldenCase& golden, std::ostream* out) { *out << golden.model.filename(); }

class ModelGolden : public testing::TestWithParam<GoldenCase> {};

TEST_P(ModelGolden, LogitsEqualTransformers) {
  const auto model = Transformer::load(GetParam().model);
  ASSERT_TRUE(model.ok()) << model.status().message();
  const auto golden = SafetensorsFile::open(GetParam().logits);
  ASSERT_TRUE(golden.ok()) << golden.status().message();
  const auto tokens = read_tensor<std::int32_t>(*golden, "tokens");
  const auto positions = read_tensor<std::int32_t>(*golden, "positions");
  const auto expected = read_tensor<float>(*golden, "logits");
  const auto vocab = static_cast<std::size_t>(model->config().vocab_size);
  ASSERT_EQ(expected.size(), positions.size() * vocab);
  float largest = 0;
  for (const float value : expected) largest = std::max(largest, std::abs(value));
  // fp32 against fp32 in another order of addition: rounding of a few hundred terms, relative to the largest logit.
  const float tolerance = 3e-5F * largest;

  ThreadPool pool;
  SparsityOptions dense;
  dense.selector.name = "dense";
  for (const std::int32_t chunk : GetParam().chunk_sizes) {
    const std::vector<float> logits = run_prompt(*model, tokens, chunk, dense, pool);
    ASSERT_EQ(logits.size(), tokens.size() * vocab);
    for (std::size_t i = 0; i < positions.size(); ++i) {
      for (std::size_t id = 0; id < vocab; ++id) {
        const float seen = logits[static_cast<std::size_t>(positions[i]) * vocab + id];
        ASSERT_NEAR(seen, expected[i * vocab + id], tolerance)
            << "chunk " << chunk << ", position " << positions[i] << ", token " << id;
      }
    }
  }
}

constexpr const char* kGoldenNames[] = {"Llama31", "Qwen3", "Qwen3Moe", "ShippedCheckpoint"};
INSTANTIATE_TEST_SUITE_P(
    , ModelGolden,
    testing::Values(
        GoldenCase{kGoldenDir / "llama31_tiny", kGoldenDir / "llama31_tiny/logits.safetensors", {300, 128, 37, 1}},
        GoldenCase{kGoldenDir / "qwen3_tiny", kGoldenDir / "qwen3_tiny/logits.safetensors", {300, 128, 37, 1}},
        GoldenCase{kGoldenDir / "qwen3_moe", kGoldenDir / "qwen3_moe/logits.safetensors", {300, 128, 37, 1}},
        GoldenCase{kDemoDir, kGoldenDir / "demo_logits.safetensors", {1024, 700}}),
    [](const auto& golden) { return kGoldenNames[golden.index]; });

}  // namespace
}  // namespace compact::engine
