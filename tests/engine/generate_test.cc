// From prompt to answer: limits, stop rules, sampling, reports.
#include "engine/scheduler/generate.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "engine/cli/demo_prompt.h"
#include "engine/loader/text_file.h"
#include "engine/report/page_map_svg.h"
#include "engine/report/run_report.h"
#include "engine/scheduler/answer.h"
#include "tests/engine/tiny_model.h"

namespace compact::engine {
namespace {

class Generate : public testing::Test {
 protected:
  Generate() : model_(Transformer::load(kGoldenDir / "llama31_tiny").value()) {
    options_.page_tokens = 16;
    options_.chunk_tokens = 64;
    options_.max_tokens = 5;
    for (std::int32_t i = 0; i < 200; ++i) prompt_.push_back((i * 37 + 11) % 96);
  }

  Result<GenerateResult> run() { return generate(model_, prompt_, options_, {}, pool_); }

  Transformer model_;
  GenerateOptions options_;
  std::vector<std::int32_t> prompt_;
  ThreadPool pool_{2};
};

TEST_F(Generate, ReportsWhatItDid) {
  const auto result = run();
  ASSERT_TRUE(result.ok()) << result.status().message();
  EXPECT_EQ(result->prompt_tokens, 200);
  EXPECT_EQ(result->prefill_chunks, 4);
  EXPECT_EQ(result->tokens.size(), 5U);
  EXPECT_EQ(result->layers.size(), 2U);
  EXPECT_GT(result->prefill_seconds, 0);
  // 200 tokens are below the crossover: the first chunk has no past, the others are short, and all of it is said.
  for (const LayerReport& layer : result->layers) {
    EXPECT_EQ(layer.chunks_by_reason[static_cast<std::size_t>(DenseReason::kFirstChunk)], 1);
    EXPECT_EQ(layer.chunks_by_reason[static_cast<std::size_t>(DenseReason::kShortContext)], 3);
    EXPECT_EQ(layer.stats.density(), 1.0);
  }
}

TEST_F(Generate, DenseFinalChunkIsSaid) {
  options_.sparsity.crossover.min_context_tokens = 0;
  options_.sparsity.selector.name = "static";
  options_.sparsity.forced = {.sink_tokens = 16, .window_tokens = 0};
  options_.page_tokens = 16;
  const auto sparse = run();
  options_.final_chunk_dense = true;
  const auto dense = run();
  ASSERT_TRUE(sparse.ok() && dense.ok());
  for (std::size_t layer = 0; layer < dense->layers.size(); ++layer) {
    const auto count = [layer](const GenerateResult& result, DenseReason reason) {
      return result.layers[layer].chunks_by_reason[static_cast<std::size_t>(reason)];
    };
    EXPECT_EQ(count(*sparse, DenseReason::kRequested), 0);
    EXPECT_EQ(count(*dense, DenseReason::kRequested), 1);
    EXPECT_EQ(count(*dense, DenseReason::kFirstChunk), 1);
    EXPECT_EQ(count(*dense, DenseReason::kNone), count(*sparse, DenseReason::kNone) - 1);
    EXPECT_GT(dense->layers[layer].stats.density(), sparse->layers[layer].stats.density());
  }
}

TEST_F(Generate, GreedyAnswerDoesNotDependOnTheChunkSize) {
  const auto expected = run()->tokens;
  for (const std::int32_t chunk : {1, 33, 200, 5000}) {
    options_.chunk_tokens = chunk;
    EXPECT_EQ(run()->tokens, expected) << "chunk " << chunk;
  }
}

TEST_F(Generate, StopsAtAnEndTokenAndLeavesItOut) {
  const auto free_run = run()->tokens;
  options_.end_tokens = {free_run[2]};
  const auto stopped = run();
  const std::size_t expected =
      static_cast<std::size_t>(std::find(free_run.begin(), free_run.end(), free_run[2]) - free_run.begin());
  EXPECT_EQ(stopped->tokens.size(), expected);
  EXPECT_TRUE(stopped->stopped_by_end_token);
}

TEST_F(Generate, StopsWhenPositionsOrPagesRunOut) {
  prompt_.resize(0);
  for (std::int32_t i = 0; i < 510; ++i) prompt_.push_back(i % 96);
  options_.max_tokens = 50;  // the model has 512 positions: tokens 511 and 512 are fed back, one more is sampled
  auto result = run();
  ASSERT_TRUE(result.ok()) << result.status().message();
  EXPECT_EQ(result->tokens.size(), 3U);
  EXPECT_FALSE(result->stopped_by_end_token);

  prompt_.resize(200);
  options_.kv_pages = 13;  // 208 tokens: 8 fed back, one more sampled
  result = run();
  ASSERT_TRUE(result.ok()) << result.status().message();
  EXPECT_EQ(result->tokens.size(), 9U);
}

TEST_F(Generate, RefusesWhatCannotWork) {
  const auto refused = [&](StatusCode code, const char* text) {
    const auto result = run();
    ASSERT_FALSE(result.ok());
    EXPECT_EQ(result.status().code(), code) << result.status().message();
    EXPECT_NE(result.status().message().find(text), std::string::npos) << result.status().message();
  };
  const GenerateOptions good = options_;
  options_.chunk_tokens = 0;
  refused(StatusCode::kInvalidArgument, "chunk is 0 tokens");
  options_ = good;
  options_.max_tokens = 0;
  refused(StatusCode::kInvalidArgument, "max-tokens is 0");
  options_ = good;
  options_.page_tokens = 48;
  refused(StatusCode::kInvalidArgument, "48");
  options_.page_tokens = 0;
  refused(StatusCode::kInvalidArgument, "0");
  options_ = good;
  options_.kv_pages = 12;
  refused(StatusCode::kOutOfMemory, "the prompt of 200 tokens needs 13 KV pages of 16 tokens; the cache has 12");
  options_ = good;
  options_.sparsity.selector.name = "magic";
  refused(StatusCode::kInvalidArgument, "mean-key");
  options_ = good;
  options_.sampling.temperature = -1;
  refused(StatusCode::kInvalidArgument, "temperature is -1");
  options_ = good;
  prompt_.resize(600, 1);
  refused(StatusCode::kInvalidArgument, "the prompt has 600 tokens; the model has 512 positions");
  prompt_.clear();
  refused(StatusCode::kInvalidArgument, "empty");
}

TEST(Sampler, GreedyTakesTheFirstOfTheLargest) {
  Sampler sampler = Sampler::create({}).value();
  EXPECT_EQ(sampler.sample(std::vector<float>{1, 3, 3, 2}), 1);
}

TEST(Sampler, SeedsRepeatAndFrequenciesFollowTheProbabilities) {
  SamplingOptions options;
  options.temperature = 1;
  options.seed = 5;
  const std::vector<float> logits = {std::log(0.7F), std::log(0.2F), std::log(0.1F)};
  const auto draw = [&](std::uint64_t seed) {
    options.seed = seed;
    Sampler sampler = Sampler::create(options).value();
    std::vector<std::int32_t> tokens;
    for (int i = 0; i < 2000; ++i) tokens.push_back(sampler.sample(logits));
    return tokens;
  };
  const auto first = draw(5);
  EXPECT_EQ(first, draw(5));
  EXPECT_NE(first, draw(6));
  EXPECT_NEAR(static_cast<double>(std::count(first.begin(), first.end(), 0)) / 2000, 0.7, 0.05);
  EXPECT_NEAR(static_cast<double>(std::count(first.begin(), first.end(), 2)) / 2000, 0.1, 0.03);
}

TEST(Sampler, NucleusAndTopKDropTheTail) {
  const std::vector<float> logits = {std::log(0.6F), std::log(0.3F), std::log(0.1F)};
  for (const bool by_k : {false, true}) {
    SamplingOptions options;
    options.temperature = 1;
    options.top_p = by_k ? 1.0F : 0.85F;
    options.top_k = by_k ? 2 : 0;
    Sampler sampler = Sampler::create(options).value();
    std::set<std::int32_t> seen;
    for (int i = 0; i < 500; ++i) seen.insert(sampler.sample(logits));
    EXPECT_EQ(seen, (std::set<std::int32_t>{0, 1}));
  }
}

TEST(Sampler, RangesAreChecked) {
  for (const SamplingOptions& options :
       {SamplingOptions{std::numeric_limits<float>::quiet_NaN(), 1, 0, 0}, SamplingOptions{1, 0, 0, 0},
        SamplingOptions{1, 1.5F, 0, 0}, SamplingOptions{1, 1, -1, 0}}) {
    EXPECT_EQ(Sampler::create(options).status().code(), StatusCode::kInvalidArgument);
  }
}

TEST(Report, JsonHasThePromisedKeys) {
  Answer answer;
  answer.text = "yes";
  answer.result.prompt_tokens = 3;
  answer.result.layers.resize(2);
  answer.result.layers[0].stats = {30, 20, 100};
  answer.result.layers[1].stats = {10, 10, 100};
  answer.result.layers[0].attend_seconds = 1;
  answer.result.layers[1].select_seconds = 0.5;
  GenerateOptions options;
  const nlohmann::json json = run_json(answer, options);
  for (const char* key : {"answer", "prompt_tokens", "ttft_seconds", "attention_seconds", "density", "union_inflation",
                          "selector", "mode", "backend"}) {
    EXPECT_TRUE(json.contains(key)) << key;
  }
  EXPECT_DOUBLE_EQ(json["density"], 0.2);
  EXPECT_DOUBLE_EQ(json["union_inflation"], 40.0 / 30.0);
  EXPECT_DOUBLE_EQ(json["attention_seconds"], 1.5);
  EXPECT_EQ(json["mode"], "paper");
  EXPECT_DOUBLE_EQ(json["layers"][0]["density"], 0.3);
  options.sparsity.selector.name = "dense";
  EXPECT_EQ(run_json(answer, options)["mode"], "dense");
}

TEST(Report, ThousandsAreGrouped) {
  EXPECT_EQ(with_thousands(0), "0");
  EXPECT_EQ(with_thousands(999), "999");
  EXPECT_EQ(with_thousands(1000), "1,000");
  EXPECT_EQ(with_thousands(-1234567), "-1,234,567");
}

TEST(Report, PictureShowsEveryPageThatWasRead) {
  std::vector<LayerReport> layers(1);
  // Two chunks of two pages; the second reads past page 0 and its own pages 2 and 3.
  layers[0].traced_pages = {{{0, 1}}, {{0, 2, 3}}};
  PageMapInput input;
  input.title = "a < b";
  input.prompt_tokens = 64;
  input.chunk_tokens = 32;
  input.page_tokens = 16;
  input.layers = &layers;
  const std::string svg = page_map_svg(input);
  EXPECT_NE(svg.find("a &lt; b"), std::string::npos);
  EXPECT_NE(svg.find("layer 0, KV head 0: 50 % of past pages"), std::string::npos) << svg;
  const auto count = [&](const char* color) {
    std::size_t found = 0;
    for (std::size_t at = svg.find(color); at != std::string::npos; at = svg.find(color, at + 1)) ++found;
    return found;
  };
  EXPECT_EQ(count("#2f6fb5"), 2U);  // legend and one past page
  EXPECT_EQ(count("#9aa5b1"), 3U);  // legend and the pages of each chunk
}

TEST(DemoPrompt, HidesFactsAndAsksForOne) {
  const auto tokenizer = Tokenizer::load(kDemoDir / "tokenizer.json");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  std::string prose;
  for (int i = 0; i < 1500; ++i) prose += "The harbour was quiet that morning, and nobody spoke. ";
  const auto prompt = make_haystack_prompt(prose, 4000, 7, *tokenizer);
  ASSERT_TRUE(prompt.ok()) << prompt.status().message();
  ASSERT_EQ(prompt->needle_offsets.size(), 4U);
  for (const std::size_t offset : prompt->needle_offsets) {
    EXPECT_EQ(prompt->text.compare(offset, 31, "One of the special magic number"), 0);
  }
  const std::string asked = prompt->text.substr(prompt->needle_offsets.front(), 120);
  EXPECT_NE(asked.find(prompt->expected), std::string::npos);
  EXPECT_TRUE(prompt->text.ends_with("mentioned in the provided text is"));
  const auto tokens = tokenizer->encode(prompt->text, true);
  EXPECT_NEAR(static_cast<double>(tokens->size()), 4000, 250);
  // Another seed, another answer: nothing is baked in.
  EXPECT_NE(make_haystack_prompt(prose, 4000, 8, *tokenizer)->expected, prompt->expected);
  EXPECT_EQ(make_haystack_prompt(prose, 90000, 7, *tokenizer).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(make_haystack_prompt(prose, 100, 7, *tokenizer).status().code(), StatusCode::kInvalidArgument);
}

TEST(Files, WholeOrNotAtAll) {
  const std::filesystem::path directory = testing::TempDir() + "compact_files_test";
  std::filesystem::create_directories(directory);
  const auto file = directory / "out.json";
  ASSERT_TRUE(write_text_file(file, std::string("a\0b", 3)).ok());
  EXPECT_EQ(read_text_file(file).value(), std::string("a\0b", 3));
  EXPECT_TRUE(check_writable(file).ok());
  EXPECT_EQ(read_text_file(directory / "missing").status().code(), StatusCode::kIoError);
  EXPECT_EQ(read_text_file(directory).status().code(), StatusCode::kIoError);
  EXPECT_EQ(check_writable(directory / "no" / "such").code(), StatusCode::kIoError);
  EXPECT_EQ(write_text_file(directory / "no" / "such", "x").code(), StatusCode::kIoError);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory), {}), 1);  // no temporary is left
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace compact::engine
