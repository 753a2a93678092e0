// xattention, quoka (pages and tokens), sub-mean, seer and random against choices that an independent NumPy program
// made (tests/golden/make_selector_goldens.py).
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <ostream>

#include "compact/paged_kv.h"
#include "compact/quoka.h"
#include "compact/selector.h"
#include "tests/golden/selector_goldens.h"
#include "tests/unit/lcg.h"
#include "tests/unit/select_step.h"

namespace compact {
namespace golden {
// Names the case when a test fails.
void PrintTo(const SelectorGolden& golden, std::ostream* out) {
  *out << golden.selector << " S " << golden.chunk_start;
}
}  // namespace golden

namespace {

using golden::SelectorGolden;
using testing::Lcg;
using testing::pages_of_row;

// Queries and keys before RoPE and the gate's weights, as the script draws them. One query head for each KV head: the
// heads of the second layout stand side by side.
struct GateInputs {
  explicit GateInputs(const SelectorGolden& golden) : weights(std::make_shared<GateWeights>()), gates(weights) {
    Lcg lcg(golden.seed + 1);
    const std::int32_t dim = golden.head_dim;
    const std::int32_t context = golden.chunk_start + golden.chunk_tokens;
    const std::vector<float> base = lcg.values(golden.q_heads * dim);
    q = lcg.values(golden.chunk_tokens * golden.q_heads * dim);
    for (std::size_t i = 0; i < q.size(); ++i) q[i] += base[i % base.size()];
    const std::int32_t key_floats = golden.kv_heads * dim;
    const std::vector<float> topics = lcg.values((context + kGateBlockTokens - 1) / kGateBlockTokens * key_floats);
    k = lcg.values(context * key_floats);
    for (std::int32_t x = 0; x < context * key_floats; ++x) {
      const std::int32_t block = x / key_floats / kGateBlockTokens;
      k[static_cast<std::size_t>(x)] += topics[static_cast<std::size_t>(block * key_floats + x % key_floats)];
    }
    const bool single = golden.page_tokens == kGateBlockTokens;
    weights->num_layers = golden::kRandomLayer + 1;
    weights->num_q_heads = golden.q_heads;
    weights->num_kv_heads = golden.kv_heads;
    weights->head_dim = dim;
    weights->mask_heads = single ? golden.q_heads : golden.kv_heads;
    weights->key_heads = weights->mask_heads;
    fill_last_layer(lcg.values(weights->key_heads * 3 * dim * dim), weights->key);
    if (!single) fill_last_layer(lcg.values(golden.q_heads * dim * dim), weights->query);
    for (std::int32_t d = 0; d < dim; d += 2) {
      weights->inverse_frequencies.push_back(static_cast<float>(std::pow(10000.0, -double(d) / dim)));
    }
  }
  // The other layers hold zeros: a mix-up shows.
  static void fill_last_layer(const std::vector<float>& drawn, std::vector<float>& all) {
    all.assign(drawn.size() * golden::kRandomLayer, 0.0F);
    for (const float value : drawn) all.push_back(value / 4);
  }

  std::vector<float> q;  // [C, Hq, D]
  std::vector<float> k;  // [L, Hkv, D]
  std::shared_ptr<GateWeights> weights;
  std::shared_ptr<const GateWeights> gates;
};

SelectorOptions options_of(const SelectorGolden& golden) {
  SelectorOptions options{.name = std::string(golden.selector)};
  options.xattention = {.stride = golden::kXAttentionStride, .mass = golden::kXAttentionMass};
  options.quoka = {.picked_queries = golden::kQuokaPickedQueries,
                   .kept_tokens = golden::kQuokaKeptPages * golden.page_tokens};
  options.sub_mean = {.share = golden::kSubMeanShare,
                      .lift = golden::kSubMeanLift,
                      .temperature = golden::kSubMeanTemperature,
                      .peak_weight = golden::kSubMeanPeakWeight};
  if (golden.selector == "seer")
    options.seer = {.threshold = golden::kSeerThreshold, .gates = GateInputs(golden).gates};
  options.random = {.seed = golden::kRandomSeed, .share = golden::kRandomShare};
  return options;
}

// The step of a golden, on a cache with the summaries that its selector wants.
class GoldenStep {
 public:
  GoldenStep(const SelectorGolden& golden, const SummaryFields& summaries)
      : golden_(golden),
        context_(golden.chunk_start + golden.chunk_tokens),
        cache_(PagedKvCache::create({.num_layers = 1,
                                     .num_kv_heads = golden.kv_heads,
                                     .head_dim = golden.head_dim,
                                     .page_tokens = golden.page_tokens,
                                     .num_pages = (context_ + golden.page_tokens - 1) / golden.page_tokens,
                                     .summaries = summaries})
                   .value()) {
    const std::int32_t key_floats = golden.kv_heads * golden.head_dim;
    Lcg lcg(golden.seed);
    const std::vector<float> base = lcg.values(golden.q_heads * golden.head_dim);
    q_ = lcg.values(golden.chunk_tokens * golden.q_heads * golden.head_dim);
    for (std::size_t i = 0; i < q_.size(); ++i) q_[i] += 2 * base[i % base.size()];
    const std::vector<float> topics = lcg.values(cache_.options().num_pages * key_floats);
    std::vector<float> k = lcg.values(context_ * key_floats);
    for (std::int32_t x = 0; x < context_; ++x) {
      for (std::int32_t d = 0; d < key_floats; ++d) {
        k[static_cast<std::size_t>(x * key_floats + d)] +=
            topics[static_cast<std::size_t>(x / golden.page_tokens * key_floats + d)];
      }
    }
    const RequestId request = cache_.add_request();
    const auto rows = contiguous_rows<const float>(k.data(), context_, golden.kv_heads, golden.head_dim);
    ThreadPool pool(1);
    EXPECT_TRUE(cache_.extend(request, context_).ok());
    const GateInputs pre(golden);
    q_pre_ = pre.q;
    const auto k_pre = contiguous_rows<const float>(pre.k.data(), context_, golden.kv_heads, golden.head_dim);
    EXPECT_TRUE(cache_.write(request, 0, 0, rows, rows, pool, k_pre).ok());
    chunk_ = {0, golden.chunk_tokens, golden.chunk_start, cache_.page_table(request).value().data()};
  }
  GoldenStep(const GoldenStep&) = delete;
  GoldenStep& operator=(const GoldenStep&) = delete;

  [[nodiscard]] SelectInput select_input() const {
    SelectInput input;
    input.chunks = std::span(&chunk_, 1);
    input.q = contiguous_rows<const float>(q_.data(), golden_.chunk_tokens, golden_.q_heads, golden_.head_dim);
    input.summaries = cache_.summaries(0);
    input.page_tokens = golden_.page_tokens;
    input.softmax_scale = 1.0F / std::sqrt(static_cast<float>(golden_.head_dim));
    input.kv = cache_.layer(0);
    input.layer = golden::kRandomLayer;
    input.q_pre = contiguous_rows<const float>(q_pre_.data(), golden_.chunk_tokens, golden_.q_heads, golden_.head_dim);
    input.forced = {golden::kSinkPages * golden_.page_tokens, golden::kWindowPages * golden_.page_tokens};
    return input;
  }

 private:
  const SelectorGolden& golden_;
  std::int32_t context_;
  PagedKvCache cache_;
  std::vector<float> q_;      // [C, Hq, D]
  std::vector<float> q_pre_;  // [C, Hq, D]  before RoPE
  ChunkView chunk_;
};

class SelectorGoldens : public ::testing::TestWithParam<SelectorGolden> {};

TEST_P(SelectorGoldens, MasksAreEqual) {
  const SelectorGolden& golden = GetParam();
  const auto selector = make_selector(options_of(golden));
  ASSERT_TRUE(selector.ok()) << selector.status().message();
  const GoldenStep step(golden, selector.value()->needs().summaries);
  ThreadPool pool(2);
  BlockMask mask;
  const Status status = selector.value()->select(step.select_input(), mask, pool);
  ASSERT_TRUE(status.ok()) << status.message();
  const std::size_t num_blocks = mask.blocks.size();
  ASSERT_EQ(static_cast<std::size_t>(mask.mask_heads) * num_blocks, golden.rows.size());
  for (std::size_t row = 0; row < golden.rows.size(); ++row) {
    EXPECT_EQ(
        pages_of_row(mask, static_cast<std::int32_t>(row / num_blocks), static_cast<std::int32_t>(row % num_blocks)),
        golden.rows[row])
        << "mask head " << row / num_blocks << ", query block " << row % num_blocks;
  }
}

INSTANTIATE_TEST_SUITE_P(Selectors, SelectorGoldens, ::testing::ValuesIn(golden::kSelectorGoldens));

class QuokaTokenGoldens : public ::testing::TestWithParam<SelectorGolden> {};

TEST_P(QuokaTokenGoldens, TokensAreEqual) {
  const SelectorGolden& golden = GetParam();
  QuokaTokenOptions options = quoka_token_preset(golden.selector).value();
  if (golden.selector == "quoka") {
    options.picked_queries = golden::kQuokaPickedQueries;
    options.kept_tokens = golden::kQuokaKeptTokens;
  }
  const GoldenStep step(golden, {.norm_k = true});
  ThreadPool pool(2);
  QuokaTokens selection;
  const Status status = select_quoka_tokens(step.select_input(), options, selection, pool);
  ASSERT_TRUE(status.ok()) << status.message();
  const auto kv_heads = static_cast<std::size_t>(golden.kv_heads);
  ASSERT_EQ(selection.runs.size() * kv_heads, golden.rows.size());
  for (std::size_t row = 0; row < golden.rows.size(); ++row) {
    const auto tokens = selection.of(selection.runs[row / kv_heads], static_cast<std::int32_t>(row % kv_heads));
    EXPECT_EQ(std::vector<std::int32_t>(tokens.begin(), tokens.end()), golden.rows[row]) << "row " << row;
  }
}

INSTANTIATE_TEST_SUITE_P(Presets, QuokaTokenGoldens, ::testing::ValuesIn(golden::kQuokaTokenGoldens));

}  // namespace
}  // namespace compact
