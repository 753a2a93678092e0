// The engine on the GPU: logits against transformers, chunk sizes, pages and answers against the CPU backend, errors.
// Needs a driver, cuBLASLt, and the sources' folder as the working directory.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "engine/cli/demo_prompt.h"
#include "engine/cuda/cuda_model.h"
#include "engine/loader/rope_frequencies.h"
#include "engine/loader/safetensors.h"
#include "engine/loader/text_file.h"
#include "engine/model/transformer.h"
#include "engine/scheduler/answer.h"

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

BatchOptions options_for(std::size_t tokens, std::int32_t chunk, std::int32_t page_tokens = 128) {
  BatchOptions options;
  options.max_step_tokens = chunk;
  options.page_tokens = page_tokens;
  options.num_pages = static_cast<std::int32_t>(tokens) / page_tokens + 1;
  options.kv_dtype = DType::kBF16;
  options.sparsity.selector.name = "dense";
  return options;
}

// Logits of every position, and what the layers did.
std::vector<float> run_prompt(const Model& model, std::span<const std::int32_t> tokens, const BatchOptions& options,
                              std::vector<LayerReport>* reports = nullptr) {
  ThreadPool pool;
  auto sequence = Sequence::create(model, options);
  if (!sequence.ok()) {
    ADD_FAILURE() << sequence.status().message();
    return {};
  }
  std::vector<float> all, logits;
  const auto chunk = static_cast<std::size_t>(options.max_step_tokens);
  for (std::size_t begin = 0; begin < tokens.size(); begin += chunk) {
    const Status status = sequence->forward(tokens.subspan(begin, std::min(chunk, tokens.size() - begin)), false,
                                            LogitsOf::kAllTokens, pool, logits);
    EXPECT_TRUE(status.ok()) << status.message();
    all.insert(all.end(), logits.begin(), logits.end());
  }
  auto done = sequence->batch().take_reports();
  EXPECT_TRUE(done.ok()) << done.status().message();
  if (reports != nullptr && done.ok()) *reports = std::move(done).value();
  return all;
}

struct GoldenCase {
  std::string model;
  std::string logits;
  std::vector<std::int32_t> chunks;
};

// The largest error is at most that of transformers in bf16, whatever the chunks.
void expect_transformers_logits(const GoldenCase& c) {
  const Golden golden = read_golden(c.logits);
  const auto model = load(c.model);
  ASSERT_NE(model, nullptr);
  const auto vocab = static_cast<std::size_t>(model->config().vocab_size);
  for (const std::int32_t chunk : c.chunks) {
    const std::vector<float> logits = run_prompt(*model, golden.tokens, options_for(golden.tokens.size(), chunk));
    ASSERT_EQ(logits.size(), golden.tokens.size() * vocab);
    float largest = 0;
    for (std::size_t i = 0; i < golden.positions.size(); ++i) {
      const auto row = static_cast<std::size_t>(golden.positions[i]) * vocab;
      for (std::size_t id = 0; id < vocab; ++id) {
        const float error = std::abs(logits[row + id] - golden.logits[i * vocab + id]);
        ASSERT_FALSE(std::isnan(error)) << "chunk " << chunk << ", position " << golden.positions[i];
        largest = std::max(largest, error);
      }
    }
    std::printf("%s chunk %d: largest error %.4f, of transformers in bf16 %.4f\n", c.model.c_str(), chunk,
                static_cast<double>(largest), static_cast<double>(golden.bf16_error));
    EXPECT_LE(largest, golden.bf16_error) << "chunk " << chunk;
  }
}

class EngineGpuGolden : public testing::TestWithParam<GoldenCase> {};

TEST_P(EngineGpuGolden, LogitsAreTransformersWithinBf16) { expect_transformers_logits(GetParam()); }

// A checkpoint that make_model_goldens.py --shape made on the GPU machine, too large to keep.
TEST(EngineGpu, LogitsOfALargeShapeAreTransformersWithinBf16) {
  const char* directory = std::getenv("COMPACT_GOLDEN_DIR");
  if (directory == nullptr) GTEST_SKIP() << "COMPACT_GOLDEN_DIR names none";
  expect_transformers_logits({directory, std::string(directory) + "/logits.safetensors", {1024, 700}});
}

constexpr const char* kGoldenNames[] = {"Llama31", "Qwen3", "Qwen3Moe", "ShippedCheckpoint"};
INSTANTIATE_TEST_SUITE_P(
    , EngineGpuGolden,
    testing::Values(
        GoldenCase{"tests/golden/llama31_d64", "tests/golden/llama31_d64/logits.safetensors", {300, 128, 37, 1}},
        GoldenCase{"tests/golden/qwen3_d128", "tests/golden/qwen3_d128/logits.safetensors", {300, 128, 37, 1}},
        GoldenCase{"tests/golden/qwen3_moe", "tests/golden/qwen3_moe/logits.safetensors", {300, 128, 37, 1}},
        GoldenCase{"assets/demo", "tests/golden/demo_logits.safetensors", {1024, 700}}),
    [](const auto& golden) { return kGoldenNames[golden.index]; });

// Pages of `random` depend on no score: both backends must read the very same, and count the same.
TEST(EngineGpu, ReadsThePagesThatTheCpuReads) {
  const auto gpu = load("tests/golden/qwen3_d128");
  const auto cpu = Transformer::load("tests/golden/qwen3_d128");
  ASSERT_TRUE(gpu != nullptr && cpu.ok());
  const Golden golden = read_golden("tests/golden/qwen3_d128/logits.safetensors");
  for (const UnionMode mode : {UnionMode::kPaper, UnionMode::kTile}) {
    BatchOptions options = options_for(golden.tokens.size(), 70, 16);
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

// Prefill and decode give the CPU's answer about a long text, from similar lists, wherever the pages are chosen:
// sub-mean with probe rows has no twin and chooses on the CPU for both.
TEST(EngineGpu, AnswersEqualTheCpus) {
  const auto gpu = load_model("assets/demo", "auto", Backend::kCuda);
  const auto cpu = load_model("assets/demo", "auto", Backend::kCpu);
  ASSERT_TRUE(gpu.ok()) << gpu.status().message();
  ASSERT_TRUE(cpu.ok()) << cpu.status().message();
  const auto text = read_text_file("assets/demo/haystack.txt");
  ASSERT_TRUE(text.ok()) << text.status().message();
  const auto prompt = make_haystack_prompt(*text, 12000, 42, cpu->tokenizer);
  ASSERT_TRUE(prompt.ok()) << prompt.status().message();
  const ModelConfig& config = cpu->transformer->config();
  ThreadPool pool;
  struct Case {
    const char* selector;
    BudgetKind budget = BudgetKind::kNative;
    float value = 0;
    bool per_head = false;  // thresholds of mean-key, two of them
    bool on_host = false;
  };
  for (const Case& c : {Case{"dense"}, Case{"mean-key"}, Case{"sub-mean"}, Case{"oracle"}, Case{"xattention"},
                        Case{"sub-mean", BudgetKind::kDensity, 0.2F}, Case{"oracle", BudgetKind::kTopN, 0.2F},
                        Case{.selector = "mean-key", .per_head = true}, Case{"mean-key", BudgetKind::kDensity, 0.2F},
                        Case{.selector = "sub-mean", .on_host = true}}) {
    SCOPED_TRACE(std::string(c.selector) + " budget " + std::to_string(static_cast<int>(c.budget)) +
                 (c.per_head ? " per head" : ""));
    GenerateOptions options;
    options.max_tokens = 12;
    options.kv_dtype = DType::kBF16;
    SelectorOptions& selector = options.sparsity.selector;
    selector.name = c.selector;
    selector.budget = {.kind = c.budget, .value = c.value};
    if (c.on_host) selector.sub_mean.probe_stride = 32;
    if (c.per_head) {
      selector.thresholds = {config.num_hidden_layers, config.num_key_value_heads, {}};
      for (std::int32_t i = 0; i < config.num_hidden_layers * config.num_key_value_heads; ++i) {
        selector.thresholds.values.push_back(i % 2 == 0 ? 0.1F : 0.03F);
      }
    }
    const auto on_gpu = answer_prompt(*gpu, prompt->text, options, {}, pool);
    const auto on_cpu = answer_prompt(*cpu, prompt->text, options, {}, pool);
    ASSERT_TRUE(on_gpu.ok()) << on_gpu.status().message();
    ASSERT_TRUE(on_cpu.ok()) << on_cpu.status().message();
    EXPECT_EQ(on_gpu->result.tokens, on_cpu->result.tokens);
    EXPECT_NE(on_gpu->text.find(prompt->expected), std::string::npos) << on_gpu->text;
    // State beside K and V is reported wherever the pages are chosen.
    const std::string name = c.selector;
    EXPECT_EQ(on_gpu->result.summary_bytes > 0, name == "mean-key" || name == "sub-mean");
    for (std::size_t layer = 0; layer < on_gpu->result.layers.size(); ++layer) {
      const UnionStats& a = on_gpu->result.layers[layer].stats;
      const UnionStats& b = on_cpu->result.layers[layer].stats;
      EXPECT_EQ(a.visible_row_pages, b.visible_row_pages);
      EXPECT_EQ(on_gpu->result.layers[layer].selected_on_host, c.on_host);
      EXPECT_NEAR(static_cast<double>(a.wanted_row_pages), static_cast<double>(b.wanted_row_pages),
                  0.05 * static_cast<double>(b.wanted_row_pages))
          << "layer " << layer;
    }
  }
}

// Gates drawn at random: the right shapes and no meaning.
std::shared_ptr<const GateWeights> made_gates(const ModelConfig& config) {
  GateWeights gates;
  gates.num_layers = config.num_hidden_layers;
  gates.num_q_heads = gates.mask_heads = gates.key_heads = config.num_attention_heads;
  gates.num_kv_heads = config.num_key_value_heads;
  gates.head_dim = config.head_dim;
  std::uint64_t state = 1;
  gates.key.resize(
      static_cast<std::size_t>(std::int64_t{gates.num_layers} * gates.key_heads * 3 * gates.head_dim * gates.head_dim));
  for (float& x : gates.key) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    x = (static_cast<float>(state >> 40) * 0x1p-24F - 0.5F) * 0.5F;
  }
  gates.inverse_frequencies = rope_inverse_frequencies(config);
  return std::make_shared<const GateWeights>(std::move(gates));
}

// Selectors that need not find the answer: sums of their lists alone.
TEST(EngineGpu, OtherSelectorsReadAsManyPagesAsOnTheCpu) {
  const auto gpu = load_model("assets/demo", "auto", Backend::kCuda);
  const auto cpu = load_model("assets/demo", "auto", Backend::kCpu);
  ASSERT_TRUE(gpu.ok() && cpu.ok());
  const auto text = read_text_file("assets/demo/haystack.txt");
  ASSERT_TRUE(text.ok()) << text.status().message();
  const auto prompt = make_haystack_prompt(*text, 6000, 7, cpu->tokenizer);
  ASSERT_TRUE(prompt.ok()) << prompt.status().message();
  ThreadPool pool;
  const ModelConfig& config = cpu->transformer->config();
  for (const char* name : {"static", "quoka", "random", "seer"}) {
    GenerateOptions options;
    options.max_tokens = 1;
    options.kv_dtype = DType::kBF16;
    options.sparsity.selector.name = name;
    options.sparsity.crossover = {.min_context_tokens = 0, .margin_1024ths = -1024};  // lists whatever they cost
    if (std::string_view(name) == "seer") options.sparsity.selector.seer = {0.02F, made_gates(config)};
    const auto on_gpu = answer_prompt(*gpu, prompt->text, options, {}, pool);
    const auto on_cpu = answer_prompt(*cpu, prompt->text, options, {}, pool);
    ASSERT_TRUE(on_gpu.ok()) << on_gpu.status().message();
    ASSERT_TRUE(on_cpu.ok()) << on_cpu.status().message();
    for (std::size_t layer = 0; layer < on_gpu->result.layers.size(); ++layer) {
      const UnionStats& a = on_gpu->result.layers[layer].stats;
      const UnionStats& b = on_cpu->result.layers[layer].stats;
      EXPECT_FALSE(on_gpu->result.layers[layer].selected_on_host) << name;
      EXPECT_LT(a.density(), 1) << name;
      EXPECT_EQ(a.visible_row_pages, b.visible_row_pages) << name;
      // Those that score keys and queries of bf16 decide otherwise where scores are close.
      const double wanted = static_cast<double>(b.wanted_row_pages);
      const bool scores = std::string_view(name) == "quoka" || std::string_view(name) == "seer";
      EXPECT_NEAR(static_cast<double>(a.wanted_row_pages), wanted, scores ? 0.05 * wanted : 0)
          << name << " layer " << layer;
    }
  }
}

TEST(EngineGpu, ErrorsAreNamedAndTheNextRequestGoesOn) {
  const auto model = load("tests/golden/llama31_d64");
  ASSERT_NE(model, nullptr);
  BatchOptions options = options_for(300, 128);
  const auto start = [&] { return model->start(options).status(); };
  options.kv_dtype = DType::kF32;
  EXPECT_EQ(start().code(), StatusCode::kUnsupported);
  options.kv_dtype = DType::kBF16;
  options.num_pages = 1 << 23;  // 2^23 pages of 128 tokens: a terabyte
  EXPECT_EQ(start().code(), StatusCode::kOutOfMemory);
  EXPECT_NE(start().message().find("KV cache"), std::string::npos) << start().message();

  options.num_pages = 1;
  auto sequence = Sequence::create(*model, options);
  ASSERT_TRUE(sequence.ok()) << sequence.status().message();
  ThreadPool pool(1);
  std::vector<float> logits;
  const auto forward = [&](std::vector<std::int32_t> tokens) {
    return sequence->forward(tokens, false, LogitsOf::kLastToken, pool, logits);
  };
  EXPECT_EQ(forward({96}).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(forward({-1}).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(forward(std::vector<std::int32_t>(100, 5)).ok());
  EXPECT_EQ(forward(std::vector<std::int32_t>(29, 5)).code(), StatusCode::kOutOfMemory);
  EXPECT_TRUE(forward(std::vector<std::int32_t>(28, 5)).ok());
  EXPECT_EQ(logits.size(), 96U);
}

// Chunks of the requests of a batch, step by step; 0: the request rests.
using Schedule = std::vector<std::vector<std::size_t>>;  // [steps][requests]

struct BatchRun {
  std::vector<std::vector<float>> logits;  // [requests] of every position
  std::vector<LayerReport> reports;
};

BatchRun run_batch(const Model& model, const std::vector<std::vector<std::int32_t>>& prompts, const Schedule& schedule,
                   const BatchOptions& options) {
  BatchRun run;
  run.logits.resize(prompts.size());
  auto batch = model.start(options);
  if (!batch.ok()) {
    ADD_FAILURE() << batch.status().message();
    return run;
  }
  ThreadPool pool(2);
  const auto vocab = static_cast<std::size_t>(model.config().vocab_size);
  std::vector<std::size_t> done(prompts.size(), 0);
  std::vector<RequestId> requests(prompts.size(), -1);  // a request comes with its first chunk and goes with its last
  for (const std::vector<std::size_t>& step : schedule) {
    std::vector<BatchPart> parts;
    for (std::size_t b = 0; b < prompts.size(); ++b) {
      if (step[b] == 0) continue;
      if (done[b] == 0) requests[b] = (*batch)->add_request({}).value();
      const auto tokens = std::span(prompts[b]).subspan(done[b], step[b]);
      parts.push_back({requests[b], tokens, step[b] == 1, LogitsOf::kAllTokens});
    }
    std::vector<float> logits;
    const Status status = (*batch)->forward(parts, pool, logits);
    EXPECT_TRUE(status.ok()) << status.message();
    auto row = logits.begin();
    for (std::size_t b = 0; b < prompts.size(); ++b) {
      const auto end = row + static_cast<std::ptrdiff_t>(step[b] * vocab);
      run.logits[b].insert(run.logits[b].end(), row, end);
      row = end;
      done[b] += step[b];
      if (step[b] == 0 || done[b] < prompts[b].size()) continue;
      EXPECT_TRUE((*batch)->release(requests[b]).ok());
    }
    EXPECT_TRUE(row == logits.end());
  }
  EXPECT_EQ((*batch)->tables().num_free_pages(), options.num_pages);
  auto reports = (*batch)->take_reports();
  EXPECT_TRUE(reports.ok()) << reports.status().message();
  if (reports.ok()) run.reports = std::move(reports).value();
  return run;
}

// Requests of different lengths, chunks and places that come and go, some below the context from which chunks are
// selected, decode steps beside chunks: logits, reasons and sums are those of lone runs.
TEST(EngineGpu, ABatchGivesWhatItsRequestsGiveAlone) {
  for (const char* const directory : {"tests/golden/qwen3_d128", "tests/golden/qwen3_moe"}) {
    const auto model = load(directory);
    ASSERT_NE(model, nullptr);
    const Golden golden = read_golden(std::string(directory) + "/logits.safetensors");
    const std::vector<std::int32_t>& all = golden.tokens;
    ASSERT_EQ(all.size(), 300U);
    // The last one comes when the second is gone: pages and rows of the table change hands.
    const std::vector<std::vector<std::int32_t>> prompts = {
        all, {all.begin() + 40, all.begin() + 250}, {all.begin(), all.begin() + 82}, {all.begin() + 9, all.end()}};
    const Schedule schedule = {{70, 0, 0, 0},  {100, 45, 0, 0}, {0, 90, 80, 0}, {99, 75, 0, 0},
                               {30, 0, 1, 90}, {0, 0, 0, 90},   {1, 0, 1, 100}, {0, 0, 0, 11}};
    for (const std::string selector : {"dense", "random", "mean-key"}) {
      SCOPED_TRACE(std::string(directory) + " " + selector);
      BatchOptions options = options_for(all.size(), 300, 16);
      options.max_requests = 3;
      options.max_request_pages = options.num_pages;
      options.num_pages = 45;
      options.sparsity.selector.name = selector;
      options.sparsity.selector.random.share = 0.3F;
      options.sparsity.forced = {.sink_tokens = 16, .window_tokens = 32};
      options.sparsity.crossover = {.min_context_tokens = 150, .margin_1024ths = -1024};
      const BatchRun together = run_batch(*model, prompts, schedule, options);
      std::vector<LayerReport> alone(together.reports.size());
      for (std::size_t b = 0; b < prompts.size(); ++b) {
        Schedule own;
        for (const std::vector<std::size_t>& step : schedule) own.push_back({step[b]});
        const BatchRun run = run_batch(*model, {prompts[b]}, own, options);
        ASSERT_EQ(run.logits[0].size(), together.logits[b].size());
        float largest = 0;
        for (std::size_t i = 0; i < run.logits[0].size(); ++i) {
          largest = std::max(largest, std::abs(run.logits[0][i] - together.logits[b][i]));
        }
        EXPECT_LE(largest, golden.bf16_error) << "request " << b;
        for (std::size_t layer = 0; layer < alone.size(); ++layer) {
          alone[layer].stats.add(run.reports[layer].stats);
          for (std::size_t r = 0; r < alone[layer].chunks_by_reason.size(); ++r) {
            alone[layer].chunks_by_reason[r] += run.reports[layer].chunks_by_reason[r];
          }
        }
      }
      for (std::size_t layer = 0; layer < alone.size(); ++layer) {
        const LayerReport& seen = together.reports[layer];
        EXPECT_EQ(seen.chunks_by_reason, alone[layer].chunks_by_reason) << "layer " << layer;
        EXPECT_EQ(seen.stats.visible_row_pages, alone[layer].stats.visible_row_pages) << "layer " << layer;
        if (selector == "mean-key") continue;  // a score near its cut may fall on either side
        EXPECT_EQ(seen.stats.wanted_row_pages, alone[layer].stats.wanted_row_pages) << "layer " << layer;
        EXPECT_EQ(seen.stats.listed_row_pages, alone[layer].stats.listed_row_pages) << "layer " << layer;
      }
    }
  }
}

// Pages that are held beyond their request begin others: logits are those of the run that computed them.
TEST(EngineGpu, APrefixThatIsHeldGivesTheLogitsOfAColdRun) {
  const auto model = load("tests/golden/qwen3_d128");
  ASSERT_NE(model, nullptr);
  const Golden golden = read_golden("tests/golden/qwen3_d128/logits.safetensors");
  for (const std::string selector : {"dense", "mean-key", "sub-mean"}) {
    BatchOptions options = options_for(golden.tokens.size(), 300, 16);
    options.num_pages = 60;
    options.max_requests = 2;
    options.sparsity.selector.name = selector;
    options.sparsity.forced = {.sink_tokens = 16, .window_tokens = 32};
    options.sparsity.crossover = {.min_context_tokens = 0, .margin_1024ths = -1024};
    auto batch = model->start(options);
    ASSERT_TRUE(batch.ok()) << batch.status().message();
    ThreadPool pool(1);
    const auto forward = [&](RequestId request, std::size_t begin, std::size_t end) {
      std::vector<float> logits;
      const BatchPart part{request, std::span(golden.tokens).subspan(begin, end - begin), false, LogitsOf::kAllTokens};
      const Status status = (*batch)->forward(std::span(&part, 1), pool, logits);
      EXPECT_TRUE(status.ok()) << status.message();
      return logits;
    };
    const RequestId cold = (*batch)->add_request({}).value();
    forward(cold, 0, 160);
    const auto table = (*batch)->tables().page_table(cold).value();
    const std::vector<std::int32_t> pages(table.begin(), table.end());
    for (const std::int32_t page : pages) ASSERT_TRUE((*batch)->hold_page(page).ok());
    const std::vector<float> expected = forward(cold, 160, 260);
    ASSERT_TRUE((*batch)->release(cold).ok());
    const RequestId stranger = (*batch)->add_request({}).value();  // takes the pages that are free
    forward(stranger, 40, 300);
    const RequestId warm = (*batch)->add_request(pages).value();
    EXPECT_EQ(forward(warm, 160, 260), expected) << selector;
    ASSERT_TRUE((*batch)->release(warm).ok());
    ASSERT_TRUE((*batch)->release(stranger).ok());
    for (const std::int32_t page : pages) ASSERT_TRUE((*batch)->drop_page(page).ok());
    EXPECT_EQ((*batch)->tables().num_free_pages(), 60);
  }
}

TEST(EngineGpu, BatchErrorsAreNamedAndNothingRan) {
  const auto model = load("tests/golden/llama31_d64");
  ASSERT_NE(model, nullptr);
  BatchOptions options = options_for(300, 128);
  options.max_step_tokens = 256;
  options.max_requests = 0;
  EXPECT_EQ(model->start(options).status().code(), StatusCode::kInvalidArgument);
  options.max_requests = 2;
  options.num_pages = 1 << 23;
  const Status too_large = model->start(options).status();
  EXPECT_EQ(too_large.code(), StatusCode::kOutOfMemory);
  EXPECT_NE(too_large.message().find("KV cache of"), std::string::npos) << too_large.message();
  options.num_pages = 2;
  options.sparsity.trace_pages = true;
  EXPECT_EQ(model->start(options).status().code(), StatusCode::kUnsupported);
  options.sparsity.trace_pages = false;
  auto batch = model->start(options);
  ASSERT_TRUE(batch.ok()) << batch.status().message();
  ThreadPool pool(1);
  std::vector<float> logits;
  const std::vector<std::int32_t> some(100, 5), more(29, 5);
  const RequestId a = (*batch)->add_request({}).value();
  const RequestId b = (*batch)->add_request({}).value();
  EXPECT_FALSE((*batch)->add_request({}).ok());
  const auto forward = [&](std::vector<BatchPart> parts) {
    for (BatchPart& part : parts) part.logits = LogitsOf::kLastToken;
    return (*batch)->forward(parts, pool, logits);
  };
  EXPECT_TRUE(forward({{a, some}, {b, some}}).ok());
  EXPECT_EQ(logits.size(), 2 * 96U);
  EXPECT_EQ(forward({{a, std::span(more).first(28)}, {b, more}}).code(), StatusCode::kOutOfMemory);
  EXPECT_TRUE(forward({{a, std::span(more).first(28)}}).ok());  // the first request is as long as before the error
  EXPECT_EQ(logits.size(), 96U);
  ASSERT_TRUE((*batch)->release(a).ok());
  EXPECT_TRUE(forward({{b, more}}).ok());  // on a page of the one that left
}

// An observer sees the queries and the cache that the CPU backend shows it, to the rounding of bf16.
TEST(EngineGpu, ObserversSeeWhatTheCpuShows) {
  const auto gpu = load("tests/golden/qwen3_d128");
  const auto cpu = Transformer::load("tests/golden/qwen3_d128");
  ASSERT_TRUE(gpu != nullptr && cpu.ok());
  const Golden golden = read_golden("tests/golden/qwen3_d128/logits.safetensors");
  BatchOptions options = options_for(golden.tokens.size(), 70, 16);
  options.extra.mean_k = true;
  std::vector<std::vector<float>> seen;  // of the first layer, [model]: queries and means of complete pages
  for (const Model* model : {static_cast<const Model*>(gpu.get()), static_cast<const Model*>(&*cpu)}) {
    auto sequence = Sequence::create(*model, options);
    ASSERT_TRUE(sequence.ok()) << sequence.status().message();
    std::vector<float>& values = seen.emplace_back();
    const auto observer = [&](const AttentionStep& step) -> Status {
      if (step.layer != 0) return {};
      for (std::int32_t t = 0; t < step.q.tokens; ++t) {
        for (std::int32_t h = 0; h < step.q.heads; ++h) {
          values.insert(values.end(), step.q.row(t, h), step.q.row(t, h) + step.q.head_dim);
        }
      }
      const PageSummaryView summaries = step.cache.summaries(0);
      for (std::int32_t j = 0; j < step.chunk.num_past_pages(16); ++j) {
        const float* mean = summaries.mean(step.chunk.page_table[j], 1);
        values.insert(values.end(), mean, mean + summaries.head_dim);
      }
      return {};
    };
    ASSERT_TRUE(sequence->batch().observe(observer).ok());
    ThreadPool pool(2);
    std::vector<float> logits;
    const std::span<const std::int32_t> tokens = golden.tokens;
    for (std::size_t begin = 0; begin < tokens.size(); begin += 70) {
      const Status status = sequence->forward(tokens.subspan(begin, std::min<std::size_t>(70, tokens.size() - begin)),
                                              false, LogitsOf::kNone, pool, logits);
      ASSERT_TRUE(status.ok()) << status.message();
    }
  }
  ASSERT_EQ(seen[0].size(), seen[1].size());
  ASSERT_GT(seen[0].size(), 300U * 4 * 128);
  for (std::size_t i = 0; i < seen[0].size(); ++i) {
    ASSERT_NEAR(seen[0][i], seen[1][i], 0.03 + 0.03 * std::abs(seen[1][i])) << i;
  }
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
