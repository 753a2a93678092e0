// The engine on the GPU: logits against transformers, chunk sizes, pages and answers against the CPU backend, errors.
// Needs a driver, cuBLASLt, and the sources' folder as the working directory.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/cuda/cuda_model.h"
#include "engine/loader/safetensors.h"
#include "engine/model/transformer.h"
#include "engine/scheduler/generate.h"

namespace compact::engine {
namespace {

struct Golden {
  std::vector<std::int32_t> tokens;
  std::vector<std::int32_t> positions;
  std::vector<float> logits;  // [positions, vocab]
  float bf16_error = 0;       // of transformers' own bf16
};

template <class T>
std::vector<T> read_tensor(const SafetensorsFile& file, const char* name) {
  const TensorInfo* tensor = file.find(name);
  if (tensor == nullptr) {
    ADD_FAILURE() << file.path() << " has no tensor " << name;
    return std::vector<T>(1);
  }
  std::vector<T> values(tensor->bytes.size() / sizeof(T));
  std::memcpy(values.data(), tensor->bytes.data(), tensor->bytes.size());
  return values;
}

Golden read_golden(const std::string& path) {
  const auto file = SafetensorsFile::open(path);
  if (!file.ok()) {
    ADD_FAILURE() << file.status().message();
    return {};
  }
  return {read_tensor<std::int32_t>(*file, "tokens"), read_tensor<std::int32_t>(*file, "positions"),
          read_tensor<float>(*file, "logits"), read_tensor<float>(*file, "bf16_error")[0]};
}

std::unique_ptr<Model> load(const std::string& directory) {
  auto model = load_cuda_model(directory);
  if (!model.ok()) {
    ADD_FAILURE() << model.status().message();
    return nullptr;
  }
  return std::move(model).value();
}

SequenceOptions options_for(std::size_t tokens, std::int32_t chunk, std::int32_t page_tokens = 128) {
  SequenceOptions options;
  options.max_chunk_tokens = chunk;
  options.page_tokens = page_tokens;
  options.num_pages = static_cast<std::int32_t>(tokens) / page_tokens + 1;
  options.kv_dtype = DType::kBF16;
  options.sparsity.selector.name = "dense";
  return options;
}

// Logits of every position, and what the layers did.
std::vector<float> run_prompt(const Model& model, std::span<const std::int32_t> tokens, const SequenceOptions& options,
                              std::vector<LayerReport>* reports = nullptr) {
  ThreadPool pool;
  auto sequence = model.start(options);
  if (!sequence.ok()) {
    ADD_FAILURE() << sequence.status().message();
    return {};
  }
  std::vector<float> all, logits;
  const auto chunk = static_cast<std::size_t>(options.max_chunk_tokens);
  for (std::size_t begin = 0; begin < tokens.size(); begin += chunk) {
    const Status status = (*sequence)->forward(tokens.subspan(begin, std::min(chunk, tokens.size() - begin)), false,
                                               LogitsOf::kAllTokens, pool, logits);
    EXPECT_TRUE(status.ok()) << status.message();
    all.insert(all.end(), logits.begin(), logits.end());
  }
  auto done = (*sequence)->take_reports();
  EXPECT_TRUE(done.ok()) << done.status().message();
  if (reports != nullptr && done.ok()) *reports = std::move(done).value();
  return all;
}

struct GoldenCase {
  const char* model;
  const char* logits;
  std::vector<std::int32_t> chunks;
};

class EngineGpuGolden : public testing::TestWithParam<GoldenCase> {};

// The largest error is at most that of transformers in bf16, whatever the chunks.
TEST_P(EngineGpuGolden, LogitsAreTransformersWithinBf16) {
  const Golden golden = read_golden(GetParam().logits);
  const auto model = load(GetParam().model);
  ASSERT_NE(model, nullptr);
  const auto vocab = static_cast<std::size_t>(model->config().vocab_size);
  for (const std::int32_t chunk : GetParam().chunks) {
    const std::vector<float> logits = run_prompt(*model, golden.tokens, options_for(golden.tokens.size(), chunk));
    ASSERT_EQ(logits.size(), golden.tokens.size() * vocab);
    float largest = 0;
    for (std::size_t i = 0; i < golden.positions.size(); ++i) {
      for (std::size_t id = 0; id < vocab; ++id) {
        const float error = std::abs(logits[static_cast<std::size_t>(golden.positions[i]) * vocab + id] -
                                     golden.logits[i * vocab + id]);
        ASSERT_FALSE(std::isnan(error)) << "chunk " << chunk << ", position " << golden.positions[i];
        largest = std::max(largest, error);
      }
    }
    std::printf("%s chunk %d: largest error %.4f, of transformers in bf16 %.4f\n", GetParam().model, chunk,
                static_cast<double>(largest), static_cast<double>(golden.bf16_error));
    EXPECT_LE(largest, golden.bf16_error) << "chunk " << chunk;
  }
}

INSTANTIATE_TEST_SUITE_P(
    , EngineGpuGolden,
    testing::Values(
        GoldenCase{"tests/golden/llama31_d64", "tests/golden/llama31_d64/logits.safetensors", {300, 128, 37, 1}},
        GoldenCase{"tests/golden/qwen3_d128", "tests/golden/qwen3_d128/logits.safetensors", {300, 128, 37, 1}},
        GoldenCase{"assets/demo", "tests/golden/demo_logits.safetensors", {1024, 700}}),
    [](const auto& golden) {
      return golden.index == 0 ? "Llama31" : golden.index == 1 ? "Qwen3" : "ShippedCheckpoint";
    });

// Pages of `random` depend on no score: both backends must read the very same, and count the same.
TEST(EngineGpu, ReadsThePagesThatTheCpuReads) {
  const auto gpu = load("tests/golden/qwen3_d128");
  const auto cpu = Transformer::load("tests/golden/qwen3_d128");
  ASSERT_TRUE(gpu != nullptr && cpu.ok());
  const Golden golden = read_golden("tests/golden/qwen3_d128/logits.safetensors");
  for (const UnionMode mode : {UnionMode::kPaper, UnionMode::kTile}) {
    SequenceOptions options = options_for(golden.tokens.size(), 70, 16);
    options.sparsity.selector.name = "random";
    options.sparsity.selector.random.share = 0.3F;
    options.sparsity.forced = {.sink_tokens = 16, .window_tokens = 32};
    options.sparsity.crossover = {.min_context_tokens = 0, .margin_1024ths = -1024};  // lists whatever they cost
    options.sparsity.unite.mode = mode;
    options.sparsity.trace_pages = true;
    std::vector<LayerReport> on_gpu, on_cpu;
    const std::vector<float> logits = run_prompt(*gpu, golden.tokens, options, &on_gpu);
    const std::vector<float> expected = run_prompt(*cpu, golden.tokens, options, &on_cpu);
    ASSERT_EQ(on_gpu.size(), on_cpu.size());
    for (std::size_t layer = 0; layer < on_gpu.size(); ++layer) {
      EXPECT_EQ(on_gpu[layer].traced_pages, on_cpu[layer].traced_pages) << "layer " << layer;
      EXPECT_EQ(on_gpu[layer].stats.listed_row_pages, on_cpu[layer].stats.listed_row_pages);
      EXPECT_EQ(on_gpu[layer].stats.wanted_row_pages, on_cpu[layer].stats.wanted_row_pages);
      EXPECT_EQ(on_gpu[layer].stats.visible_row_pages, on_cpu[layer].stats.visible_row_pages);
      EXPECT_EQ(on_gpu[layer].chunks_by_reason, on_cpu[layer].chunks_by_reason);
      EXPECT_LT(on_gpu[layer].stats.density(), 0.8);
    }
    ASSERT_EQ(logits.size(), expected.size());
    float largest = 0;
    for (std::size_t i = 0; i < logits.size(); ++i) largest = std::max(largest, std::abs(logits[i] - expected[i]));
    EXPECT_LE(largest, 2 * golden.bf16_error);
  }
}

// Prefill and decode give the tokens of the CPU backend, dense and by mean-key, and similar lists.
TEST(EngineGpu, GreedyAnswersEqualTheCpus) {
  const auto gpu = load("assets/demo");
  const auto cpu = Transformer::load("assets/demo");
  ASSERT_TRUE(gpu != nullptr && cpu.ok());
  const Golden golden = read_golden("tests/golden/demo_logits.safetensors");
  std::vector<std::int32_t> prompt;
  for (int i = 0; i < 4; ++i) prompt.insert(prompt.end(), golden.tokens.begin(), golden.tokens.end());
  ThreadPool pool;
  for (const char* selector : {"dense", "mean-key"}) {
    GenerateOptions options;
    options.max_tokens = 8;
    options.kv_dtype = DType::kBF16;
    options.sparsity.selector.name = selector;
    const auto on_gpu = generate(*gpu, prompt, options, {}, pool);
    const auto on_cpu = generate(*cpu, prompt, options, {}, pool);
    ASSERT_TRUE(on_gpu.ok()) << on_gpu.status().message();
    ASSERT_TRUE(on_cpu.ok()) << on_cpu.status().message();
    EXPECT_EQ(on_gpu->tokens, on_cpu->tokens) << selector;
    for (std::size_t layer = 0; layer < on_gpu->layers.size(); ++layer) {
      const UnionStats& a = on_gpu->layers[layer].stats;
      const UnionStats& b = on_cpu->layers[layer].stats;
      EXPECT_EQ(a.visible_row_pages, b.visible_row_pages);
      EXPECT_NEAR(static_cast<double>(a.wanted_row_pages), static_cast<double>(b.wanted_row_pages),
                  0.05 * static_cast<double>(b.wanted_row_pages))
          << selector << " layer " << layer;
    }
  }
}

TEST(EngineGpu, ErrorsAreNamedAndTheNextRequestGoesOn) {
  const auto model = load("tests/golden/llama31_d64");
  ASSERT_NE(model, nullptr);
  SequenceOptions options = options_for(300, 128);
  const auto start = [&] { return model->start(options).status(); };
  options.sparsity.selector.name = "xattention";
  EXPECT_EQ(start().code(), StatusCode::kUnsupported);
  EXPECT_NE(start().message().find("allowed: dense, mean-key, random"), std::string::npos) << start().message();
  options.sparsity.selector.name = "dense";
  options.kv_dtype = DType::kF32;
  EXPECT_EQ(start().code(), StatusCode::kUnsupported);
  options.kv_dtype = DType::kBF16;
  options.num_pages = 1 << 23;  // 2^23 pages of 128 tokens: a terabyte
  EXPECT_EQ(start().code(), StatusCode::kOutOfMemory);
  EXPECT_NE(start().message().find("KV cache"), std::string::npos) << start().message();

  options.num_pages = 1;
  auto sequence = model->start(options);
  ASSERT_TRUE(sequence.ok()) << sequence.status().message();
  ThreadPool pool(1);
  std::vector<float> logits;
  const auto forward = [&](std::vector<std::int32_t> tokens) {
    return (*sequence)->forward(tokens, false, LogitsOf::kLastToken, pool, logits);
  };
  EXPECT_EQ(forward({96}).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(forward({-1}).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(forward(std::vector<std::int32_t>(100, 5)).ok());
  EXPECT_EQ(forward(std::vector<std::int32_t>(29, 5)).code(), StatusCode::kOutOfMemory);
  EXPECT_TRUE(forward(std::vector<std::int32_t>(28, 5)).ok());
  EXPECT_EQ(logits.size(), 96U);
  EXPECT_EQ((*sequence)->observe({}).code(), StatusCode::kUnsupported);
}

// Same seed, same weights: speed figures are of one model.
TEST(EngineGpu, RandomWeightsAreDeterministic) {
  const auto config = load_model_config("tests/golden/qwen3_d128");
  ASSERT_TRUE(config.ok());
  std::vector<std::int32_t> tokens;
  for (std::int32_t i = 0; i < 200; ++i) tokens.push_back(i * 7 % 80);
  std::vector<std::vector<float>> logits;
  for (const std::uint64_t seed : {1U, 1U, 2U}) {
    const auto model = make_random_cuda_model(*config, seed);
    ASSERT_TRUE(model.ok()) << model.status().message();
    logits.push_back(run_prompt(**model, tokens, options_for(tokens.size(), 64)));
    float largest = 0;
    for (const float value : logits.back()) {
      ASSERT_TRUE(std::isfinite(value));
      largest = std::max(largest, std::abs(value));
    }
    EXPECT_GT(largest, 0.1F);
    EXPECT_LT(largest, 100.0F);
  }
  EXPECT_EQ(logits[0], logits[1]);
  EXPECT_NE(logits[0], logits[2]);
}

}  // namespace
}  // namespace compact::engine
