// xattention, quoka, sub-mean and random against masks that an independent NumPy program made
// (tests/golden/make_selector_goldens.py).
#include <gtest/gtest.h>

#include <cmath>
#include <ostream>

#include "compact/paged_kv.h"
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

SelectorOptions options_of(const SelectorGolden& golden) {
  SelectorOptions options{.name = std::string(golden.selector)};
  options.xattention = {.stride = golden::kXAttentionStride, .mass = golden::kXAttentionMass};
  options.quoka = {.picked_queries = golden::kQuokaPickedQueries,
                   .kept_tokens = golden::kQuokaKeptPages * golden.page_tokens};
  options.sub_mean = {.share = golden::kSubMeanShare,
                      .lift = golden::kSubMeanLift,
                      .temperature = golden::kSubMeanTemperature,
                      .peak_weight = golden::kSubMeanPeakWeight};
  options.random = {.seed = golden::kRandomSeed, .share = golden::kRandomShare};
  return options;
}

class SelectorGoldens : public ::testing::TestWithParam<SelectorGolden> {};

TEST_P(SelectorGoldens, MasksAreEqual) {
  const SelectorGolden& golden = GetParam();
  const std::int32_t context = golden.chunk_start + golden.chunk_tokens;
  const std::int32_t num_pages = (context + golden.page_tokens - 1) / golden.page_tokens;
  const std::int32_t key_floats = golden.kv_heads * golden.head_dim;
  Lcg lcg(golden.seed);
  const std::vector<float> base = lcg.values(golden.q_heads * golden.head_dim);
  std::vector<float> q = lcg.values(golden.chunk_tokens * golden.q_heads * golden.head_dim);
  for (std::size_t i = 0; i < q.size(); ++i) q[i] += 2 * base[i % base.size()];
  const std::vector<float> topics = lcg.values(num_pages * key_floats);
  std::vector<float> k = lcg.values(context * key_floats);
  for (std::int32_t x = 0; x < context; ++x) {
    for (std::int32_t d = 0; d < key_floats; ++d) {
      k[static_cast<std::size_t>(x * key_floats + d)] +=
          topics[static_cast<std::size_t>(x / golden.page_tokens * key_floats + d)];
    }
  }

  const auto selector = make_selector(options_of(golden));
  ASSERT_TRUE(selector.ok()) << selector.status().message();
  auto cache = PagedKvCache::create({.num_layers = 1,
                                     .num_kv_heads = golden.kv_heads,
                                     .head_dim = golden.head_dim,
                                     .page_tokens = golden.page_tokens,
                                     .num_pages = num_pages,
                                     .summaries = selector.value()->needs().summaries});
  ASSERT_TRUE(cache.ok()) << cache.status().message();
  ThreadPool pool(2);
  const RequestId request = cache.value().add_request();
  const auto rows = contiguous_rows<const float>(k.data(), context, golden.kv_heads, golden.head_dim);
  ASSERT_TRUE(cache.value().extend(request, context).ok());
  ASSERT_TRUE(cache.value().write(request, 0, 0, rows, rows, pool).ok());
  const ChunkView chunk{0, golden.chunk_tokens, golden.chunk_start, cache.value().page_table(request).value().data()};

  SelectInput input;
  input.chunks = std::span(&chunk, 1);
  input.q = contiguous_rows<const float>(q.data(), golden.chunk_tokens, golden.q_heads, golden.head_dim);
  input.summaries = cache.value().summaries(0);
  input.page_tokens = golden.page_tokens;
  input.softmax_scale = 1.0F / std::sqrt(static_cast<float>(golden.head_dim));
  input.kv = cache.value().layer(0);
  input.layer = golden::kRandomLayer;
  input.forced = {golden::kSinkPages * golden.page_tokens, golden::kWindowPages * golden.page_tokens};
  BlockMask mask;
  const Status status = selector.value()->select(input, mask, pool);
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

}  // namespace
}  // namespace compact
