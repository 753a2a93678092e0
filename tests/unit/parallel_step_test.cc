// The whole step on several threads: the same bits as on one, and nothing for the thread sanitizer to find.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "compact/attention.h"
#include "compact/paged_kv.h"

namespace compact {
namespace {

constexpr std::int32_t kHq = 8;
constexpr std::int32_t kHkv = 2;
constexpr std::int32_t kD = 16;
constexpr std::int32_t kP = 16;
constexpr std::int32_t kC = 200;  // chunks start inside pages
constexpr std::int32_t kChunks = 4;

// Outputs of every chunk: append, select, unite, attend.
std::vector<float> run_step(std::int32_t num_threads, UnionMode mode) {
  ThreadPool pool(num_threads);
  PagedKvCache cache = PagedKvCache::create({.num_layers = 1,
                                             .num_kv_heads = kHkv,
                                             .head_dim = kD,
                                             .page_tokens = kP,
                                             .num_pages = kChunks * kC / kP + 1})
                           .value();
  const auto selector = make_selector({}).value();
  const RequestId request = cache.add_request();
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> outputs;
  BlockMask mask;
  PageLists lists;
  for (std::int32_t start = 0; start < kChunks * kC; start += kC) {
    std::vector<float> q(kC * kHq * kD), k(kC * kHkv * kD), v(kC * kHkv * kD), o(q.size());
    for (auto* rows : {&q, &k, &v}) {
      for (float& x : *rows) x = normal(random);
    }
    EXPECT_TRUE(cache.extend(request, kC).ok());
    EXPECT_TRUE(cache
                    .write(request, 0, start, contiguous_rows<const float>(k.data(), kC, kHkv, kD),
                           contiguous_rows<const float>(v.data(), kC, kHkv, kD), pool)
                    .ok());
    const ChunkView chunk{
        .chunk_tokens = kC, .chunk_start = start, .page_table = cache.page_table(request).value().data()};
    const auto rows = contiguous_rows<const float>(q.data(), kC, kHq, kD);
    EXPECT_TRUE(selector->select({{&chunk, 1}, rows, cache.summaries(0), kP, 0.25F}, mask, pool).ok());
    const UnionInput input{.chunks = {&chunk, 1},
                           .num_q_heads = kHq,
                           .num_kv_heads = kHkv,
                           .page_tokens = kP,
                           .num_physical_pages = cache.options().num_pages,
                           .forced = {kP, 2 * kP},
                           .options = {.mode = mode}};
    EXPECT_TRUE(build_page_lists(input, mask, lists, pool).ok());
    EXPECT_TRUE(attend_cpu({rows, cache.layer(0), lists.units, lists.page_ids, lists.heads_per_unit, 0.25F},
                           {contiguous_rows(o.data(), kC, kHq, kD)}, pool)
                    .ok());
    outputs.insert(outputs.end(), o.begin(), o.end());
  }
  return outputs;
}

TEST(ParallelStep, BitsDoNotDependOnTheNumberOfThreads) {
  for (const UnionMode mode : {UnionMode::kPaper, UnionMode::kAdaptive}) {
    const std::vector<float> expected = run_step(1, mode);
    for (const std::int32_t threads : {2, 3, 8}) EXPECT_EQ(run_step(threads, mode), expected) << threads << " threads";
  }
}

}  // namespace
}  // namespace compact
