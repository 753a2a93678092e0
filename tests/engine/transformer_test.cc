// Invariants of the forward pass: chunking, threads, prefix reuse, keep-all thresholds, bad input.
#include "engine/model/transformer.h"

#include <algorithm>
#include <cmath>

#include "engine/model/experts.h"
#include "engine/model/layers.h"
#include "tests/engine/tiny_model.h"

namespace compact::engine {
namespace {

Transformer load_tiny(const char* name) {
  auto model = Transformer::load(kGoldenDir / name);
  EXPECT_TRUE(model.ok()) << model.status().message();
  return std::move(model).value();
}

std::vector<std::int32_t> prompt_of(const Transformer& model, std::int32_t tokens) {
  std::vector<std::int32_t> prompt;
  std::uint32_t state = 7;
  for (std::int32_t i = 0; i < tokens; ++i) {
    state = state * 1664525U + 1013904223U;
    prompt.push_back(static_cast<std::int32_t>((state >> 8) % static_cast<std::uint32_t>(model.config().vocab_size)));
  }
  return prompt;
}

float largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  float largest = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) largest = std::max(largest, std::abs(a[i] - b[i]));
  return largest;
}

SparsityOptions with_selector(const char* name) {
  SparsityOptions options;
  options.selector.name = name;
  options.crossover.min_context_tokens = 0;
  // The tests want the selector's lists, not what the cost model makes of them at 500 tokens.
  options.crossover.margin_1024ths = -1024;
  return options;
}

TEST(Transformer, DenseLogitsDoNotDependOnTheChunkSize) {
  const Transformer model = load_tiny("llama31_tiny");
  const auto prompt = prompt_of(model, 400);
  ThreadPool pool;
  const auto whole = run_prompt(model, prompt, 400, with_selector("dense"), pool, 16);
  for (const std::int32_t chunk : {1, 7, 16, 128, 399}) {
    EXPECT_LT(largest_difference(whole, run_prompt(model, prompt, chunk, with_selector("dense"), pool, 16)), 1e-3F)
        << "chunk " << chunk;
  }
}

TEST(Transformer, LogitsDoNotDependOnTheNumberOfThreads) {
  const Transformer model = load_tiny("llama31_tiny");
  const auto prompt = prompt_of(model, 300);
  ThreadPool one(1);
  ThreadPool three(3);
  for (const char* selector : {"dense", "mean-key"}) {
    EXPECT_EQ(run_prompt(model, prompt, 64, with_selector(selector), one, 16),
              run_prompt(model, prompt, 64, with_selector(selector), three, 16))
        << selector;
  }
}

TEST(Transformer, ThresholdZeroIsDense) {
  const Transformer model = load_tiny("llama31_tiny");
  const auto prompt = prompt_of(model, 500);
  ThreadPool pool;
  SparsityOptions keep_all = with_selector("mean-key");
  keep_all.selector.mean_key.share = 0;
  // The same pages in the same order by the same kernel: not a bit may differ.
  EXPECT_EQ(run_prompt(model, prompt, 96, keep_all, pool, 16),
            run_prompt(model, prompt, 96, with_selector("dense"), pool, 16));
}

TEST(Transformer, SparseSelectorsDropPagesAndChangeLogits) {
  const Transformer model = load_tiny("llama31_tiny");
  const auto prompt = prompt_of(model, 500);
  ThreadPool pool;
  const auto dense = run_prompt(model, prompt, 96, with_selector("dense"), pool, 16);
  SparsityOptions narrow = with_selector("static");
  narrow.forced = {16, 32};
  EXPECT_GT(largest_difference(dense, run_prompt(model, prompt, 96, narrow, pool, 16)), 1e-2F);
}

TEST(Transformer, PrefixReuseGivesTheBitsOfAColdRun) {
  const Transformer model = load_tiny("qwen3_tiny");
  const ModelConfig& config = model.config();
  const auto prompt = prompt_of(model, 300);
  ThreadPool pool;
  for (const std::int32_t shared : {96, 128, 200}) {  // inside a page of 64, at its end, inside another
    auto attention =
        ChunkAttention::create(with_selector("mean-key"), config.num_hidden_layers, config.num_attention_heads,
                               config.num_key_value_heads, softmax_scale(config));
    ASSERT_TRUE(attention.ok());
    auto cache = PagedKvCache::create({config.num_hidden_layers, config.num_key_value_heads, config.head_dim, 64, 20,
                                       DType::kBF16, KvLayout::kHnd, true});
    ASSERT_TRUE(cache.ok());
    const auto forward = [&](RequestId request, std::int32_t begin, std::int32_t end) {
      std::vector<float> logits;
      const auto tokens =
          std::span(prompt).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
      const BatchPart part{request, tokens, false, LogitsOf::kAllTokens};
      const Status status = model.forward(std::span(&part, 1), *cache, *attention, pool, logits);
      EXPECT_TRUE(status.ok()) << status.message();
      return logits;
    };
    const RequestId cold = cache->add_request();
    forward(cold, 0, shared);
    const auto hot = cache->fork(cold, shared);
    ASSERT_TRUE(hot.ok()) << hot.status().message();
    const auto cold_logits = forward(cold, shared, 300);
    const auto hot_logits = forward(*hot, shared, 300);
    EXPECT_EQ(cold_logits, hot_logits) << "shared " << shared;
  }
}

TEST(Transformer, BadInputIsNamed) {
  const Transformer model = load_tiny("qwen3_tiny");
  const ModelConfig& config = model.config();
  ThreadPool pool(1);
  BatchOptions options;
  options.page_tokens = 16;
  options.num_pages = 100;
  auto sequence = Sequence::create(model, options);
  ASSERT_TRUE(sequence.ok()) << sequence.status().message();
  std::vector<float> logits;
  const std::vector<std::int32_t> outside = {1, config.vocab_size};
  Status status = sequence->forward(outside, false, LogitsOf::kLastToken, pool, logits);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("token id 80"), std::string::npos) << status.message();

  const std::vector<std::int32_t> too_long(static_cast<std::size_t>(config.max_position_embeddings) + 1, 1);
  status = sequence->forward(too_long, false, LogitsOf::kLastToken, pool, logits);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("needs 513 positions"), std::string::npos) << status.message();

  SparsityOptions indivisible = with_selector("mean-key");
  indivisible.unite.heads_per_unit = 2;  // G is 7
  EXPECT_EQ(ChunkAttention::create(indivisible, 2, 7, 1, 1.0F).status().code(), StatusCode::kInvalidArgument);
}

TEST(Transformer, LogitsOfAMixtureDoNotDependOnTheNumberOfThreads) {
  const Transformer model = load_tiny("qwen3_moe");
  const auto prompt = prompt_of(model, 200);
  ThreadPool one(1);
  ThreadPool three(3);
  EXPECT_EQ(run_prompt(model, prompt, 96, with_selector("dense"), one, 16),
            run_prompt(model, prompt, 96, with_selector("dense"), three, 16));
}

TEST(Experts, RoutesByHand) {
  ThreadPool pool(1);
  const std::vector<float> logits = {0, std::log(3.0F),
                                     0, std::log(4.0F),  // 1, 3, 1, 4 of 9
                                     1, 1,
                                     1, 1};
  const ExpertConfig all_count{.num_experts = 4, .experts_per_token = 3};
  const ExpertRoutes plain = route_to_experts(logits.data(), 2, all_count, pool);
  EXPECT_EQ(plain.experts, (std::vector<std::int32_t>{3, 1, 0, 0, 1, 2}));  // of equals the lower one
  const ExpertConfig chosen_count{.num_experts = 4, .experts_per_token = 3, .normalize_weights = true};
  const ExpertRoutes normalized = route_to_experts(logits.data(), 2, chosen_count, pool);
  EXPECT_EQ(normalized.experts, plain.experts);
  const float ninths[] = {4, 3, 1};
  for (std::size_t j = 0; j < 3; ++j) {
    EXPECT_FLOAT_EQ(plain.weights[j], ninths[j] / 9);
    EXPECT_FLOAT_EQ(normalized.weights[j], ninths[j] / 8);
    EXPECT_FLOAT_EQ(plain.weights[3 + j], 0.25F);
  }
}

TEST(Layers, RmsNormByHand) {
  ThreadPool pool(1);
  const std::vector<float> x = {3, 4};
  const std::vector<float> weight = {1, 2};
  std::vector<float> out(2);
  rms_norm(x.data(), weight.data(), 0, 1, 2, out.data(), pool);  // rms = sqrt(12.5)
  EXPECT_FLOAT_EQ(out[0], 3 / std::sqrt(12.5F));
  EXPECT_FLOAT_EQ(out[1], 8 / std::sqrt(12.5F));
}

TEST(Layers, RopeRotatesPairsHalfAHeadApart) {
  ThreadPool pool(1);
  std::vector<float> x = {1, 0, 0, 1};  // pairs (0, 2) and (1, 3)
  const float quarter_turn = std::acos(-1.0F) / 2;
  apply_rope(make_rope_table({quarter_turn, 0}, std::vector<std::int32_t>{1}), contiguous_rows(x.data(), 1, 1, 4),
             pool);
  EXPECT_NEAR(x[0], 0, 1e-6F);
  EXPECT_NEAR(x[2], 1, 1e-6F);
  EXPECT_EQ(x[1], 0);
  EXPECT_EQ(x[3], 1);
}

}  // namespace
}  // namespace compact::engine
