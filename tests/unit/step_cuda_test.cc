// The plan and the union of src/unite/cuda on the CPU, by the code that runs on the device, against the CPU's union;
// and the host's checks.
#include <gtest/gtest.h>

#include <set>

#include "compact/select_cuda.h"
#include "src/unite/cuda/step_layout.h"
#include "tests/one_thread.h"
#include "tests/step_case.h"

namespace compact {
namespace {

using testing::difference_to_cpu;
using testing::OneThread;
using testing::StepCase;
using testing::StepRandom;

// Everything that the device would hold, with poison where it writes; as many CTAs as step.cc launches.
struct HostStep {
  StepLayout layout;
  std::vector<std::uint64_t> workspace, mask;
  std::vector<AttentionUnit> units;
  std::vector<std::int32_t> page_ids;
  std::vector<UnionStats> stats;
  std::vector<DenseReason> reasons;
  std::int32_t num_units = -1;
  std::int32_t error = 0;

  HostStep(StepCase& c, const std::vector<std::int32_t>* mean_tokens = nullptr) {
    c.input.chunks = c.chunks.data();
    c.input.page_tables = c.page_tables.data();
    c.input.mean_tokens = mean_tokens == nullptr ? nullptr : mean_tokens->data();
    Result<StepLayout> made = lay_out_step(c.input);
    EXPECT_TRUE(made.ok()) << made.status().message();
    layout = *made;
    const CudaStepSizes& sizes = layout.sizes;
    workspace.assign(static_cast<std::size_t>(sizes.workspace_bytes) / 8, ~std::uint64_t{0});
    mask = c.device_mask(sizes);
    units.resize(static_cast<std::size_t>(sizes.max_units));
    page_ids.assign(static_cast<std::size_t>(sizes.num_list_entries), -1);
    stats.assign(static_cast<std::size_t>(sizes.num_stats), {-1, -1, -1});
    reasons.assign(stats.size(), DenseReason::kSelector);  // which no tree gives
    OneThread thread;
    const PlanArgs plan = plan_args(layout, c.input, &error, workspace.data());
    for (std::int32_t b = 0; b < layout.plan_ctas; ++b) plan_chunk(thread, plan, b);
    const CudaPageLists lists{.units = units.data(),
                              .num_units = &num_units,
                              .page_ids = page_ids.data(),
                              .stats = stats.data(),
                              .reasons = reasons.data()};
    const UniteArgs args = unite_args(layout, c.input, mask.data(), lists, workspace.data());
    for (std::int32_t tree = 0; tree < layout.unite_trees; ++tree) UniteTree(args, tree, thread).run(thread);
  }
  StepTables tables() { return layout.tables(workspace.data()); }
};

TEST(StepCuda, TenThousandStepsEqualTheCpuUnion) {
  std::set<UnionMode> modes;
  std::set<std::pair<bool, std::int32_t>> shapes;  // a row per query head, tokens of a block
  std::int64_t merged = 0;
  for (std::uint64_t seed = 0; seed < 10000; ++seed) {
    StepRandom random(seed);
    StepCase c;
    make_random_step(c, random);
    HostStep step(c);
    ASSERT_EQ(step.error, 0) << "seed " << seed;
    ASSERT_EQ(difference_to_cpu(c, step.layout.sizes, step.num_units, step.units, step.page_ids, step.stats), "")
        << "seed " << seed << ": " << c.text();
    modes.insert(c.input.options.mode);
    shapes.insert({c.mask.mask_heads != c.input.num_kv_heads, c.block_tokens()});
    for (std::int32_t u = 0; u < step.num_units; ++u) merged += step.units[static_cast<std::size_t>(u)].q_len == 0;
  }
  EXPECT_EQ(modes.size(), 4U);
  EXPECT_EQ(shapes.size(), 12U);
  EXPECT_GT(merged, 1000);
}

TEST(StepCuda, BlocksAreThoseOfMakeQueryBlocks) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    StepRandom random(seed);
    StepCase c;
    make_random_step(c, random);
    HostStep step(c);
    const std::vector<QueryBlock>& want = c.mask.blocks;
    ASSERT_EQ(step.tables().header->num_blocks, static_cast<std::int32_t>(want.size())) << c.text();
    ASSERT_EQ(step.layout.sizes.block_tokens, c.block_tokens());
    for (std::size_t i = 0; i < want.size(); ++i) {
      const QueryBlock& got = step.tables().blocks[i];
      ASSERT_TRUE(got.chunk == want[i].chunk && got.q_begin == want[i].q_begin && got.tokens == want[i].tokens &&
                  got.first_position == want[i].first_position)
          << "block " << i << ": " << c.text();
    }
  }
}

TEST(StepCuda, PairsHoldEveryBlockOnceWithItsNeighbour) {
  std::int64_t alone = 0;
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    StepRandom random(seed);
    StepCase c;
    make_random_step(c, random);
    HostStep step(c);
    const StepTables tables = step.tables();
    ASSERT_LE(tables.header->num_pairs, step.layout.shape.max_pairs) << c.text();
    std::int32_t next = 0;
    for (std::int32_t p = 0; p < tables.header->num_pairs; ++p) {
      const BlockPair& pair = tables.pairs[p];
      ASSERT_EQ(pair.first_block, next) << "pair " << p << ": " << c.text();
      ASSERT_TRUE(pair.num_blocks == 1 || pair.num_blocks == 2) << "pair " << p << ": " << c.text();
      next += pair.num_blocks;
      const std::int32_t chunk = tables.blocks[pair.first_block].chunk;
      ASSERT_EQ(tables.blocks[next - 1].chunk, chunk) << "pair " << p << ": " << c.text();
      if (pair.num_blocks == 2) continue;
      ++alone;
      ASSERT_TRUE(next == tables.header->num_blocks || tables.blocks[next].chunk != chunk) << c.text();
    }
    ASSERT_EQ(next, tables.header->num_blocks) << c.text();
  }
  EXPECT_GT(alone, 50);
}

// Every (chunk, sub-group) for itself: all pages if the context is short or its units cost as much as dense.
TEST(StepCuda, CrossoverDecidesByCostAndContext) {
  std::int64_t counts[kNumDenseReasons] = {};
  for (std::uint64_t seed = 0; seed < 1000; ++seed) {
    StepRandom random(seed);
    StepCase c;
    make_random_step(c, random);
    const HostStep lists(c);
    c.input.crosses_over = true;
    c.input.crossover = {random.pick({0, 100, 2000}), random.pick({0, 154, 1024})};
    const HostStep step(c);
    const CudaStepSizes& sizes = step.layout.sizes;
    ASSERT_EQ(step.num_units, lists.num_units);
    const std::int32_t sub_groups = c.input.num_q_heads / sizes.heads_per_unit, p = c.input.page_tokens;
    std::vector<std::int64_t> cost(step.stats.size());
    const auto tree_of = [&](const AttentionUnit& unit) {
      for (std::size_t b = 0; b < c.chunks.size(); ++b) {
        const std::int32_t row = unit.q_begin - c.chunks[b].q_begin;
        if (row >= 0 && row < c.chunks[b].chunk_tokens) {
          return b * static_cast<std::size_t>(sub_groups) +
                 static_cast<std::size_t>(unit.q_head / sizes.heads_per_unit);
        }
      }
      return cost.size();
    };
    for (std::int32_t u = 0; u < lists.num_units; ++u) {
      const AttentionUnit& unit = lists.units[static_cast<std::size_t>(u)];
      if (unit.q_len == 0) continue;
      cost[tree_of(unit)] +=
          unit_cost(c.input.options.cost, unit.q_len, sizes.heads_per_unit, (unit.list_tokens + p - 1) / p, p);
    }
    std::vector<std::int32_t> units(cost.size()), dense_units(cost.size());
    for (std::int32_t u = 0; u < step.num_units; ++u) {
      const AttentionUnit& unit = step.units[static_cast<std::size_t>(u)];
      if (unit.q_len == 0) continue;
      const std::size_t tree = tree_of(unit);
      const CudaChunk& chunk = c.chunks[tree / static_cast<std::size_t>(sub_groups)];
      ++units[tree];
      const std::int32_t* ids = step.page_ids.data() + unit.list_begin;
      const std::int32_t* table = c.page_tables.data() + chunk.table_row * c.input.page_table_stride;
      const std::int32_t context = chunk.chunk_start + chunk.chunk_tokens;
      dense_units[tree] += unit.q_len == chunk.chunk_tokens && unit.list_tokens == context &&
                           unit.past_tokens == chunk.chunk_start && unit.causal_shift == 0 &&
                           std::equal(ids, ids + (context + p - 1) / p, table);
    }
    for (std::size_t tree = 0; tree < cost.size(); ++tree) {
      const CudaChunk& chunk = c.chunks[tree / static_cast<std::size_t>(sub_groups)];
      const std::int32_t context = chunk.chunk_start + chunk.chunk_tokens, past_pages = chunk.chunk_start / p;
      DenseReason want = DenseReason::kNone;
      if (chunk.chunk_tokens > 0 && past_pages == 0) {
        want = DenseReason::kFirstChunk;
      } else if (chunk.chunk_tokens > 0 && context < c.input.crossover.min_context_tokens) {
        want = DenseReason::kShortContext;
      } else if (chunk.chunk_tokens > 0 && cost[tree] * (1024 + c.input.crossover.margin_1024ths) >=
                                               1024 * unit_cost(c.input.options.cost, chunk.chunk_tokens,
                                                                sizes.heads_per_unit, (context + p - 1) / p, p)) {
        want = DenseReason::kHighDensity;
      }
      ASSERT_EQ(step.reasons[tree], want) << "seed " << seed << " tree " << tree << ": " << c.text();
      ++counts[static_cast<std::size_t>(want)];
      const UnionStats& stats = step.stats[tree];
      if (want == DenseReason::kShortContext || want == DenseReason::kHighDensity) {
        ASSERT_TRUE(units[tree] == 1 && dense_units[tree] == 1)
            << "seed " << seed << " tree " << tree << ": " << c.text();
        ASSERT_EQ(stats.listed_row_pages, stats.visible_row_pages);
      } else {
        ASSERT_EQ(stats.listed_row_pages, lists.stats[tree].listed_row_pages);
      }
    }
  }
  for (const DenseReason reason :
       {DenseReason::kNone, DenseReason::kFirstChunk, DenseReason::kShortContext, DenseReason::kHighDensity}) {
    EXPECT_GT(counts[static_cast<std::size_t>(reason)], 200) << dense_reason_name(reason);
  }
}

// A chunk with a mistake lists nothing and is reported; the others are as if it were empty.
TEST(StepCuda, MistakesOnTheDeviceEmptyTheirChunk) {
  const auto run = [](CudaStepError expected, auto&& spoil) {
    StepRandom random(7);
    StepCase c;
    c.input.num_kv_heads = 2;
    c.input.num_q_heads = 8;
    c.input.page_tokens = 16;
    c.input.options.mode = UnionMode::kTile;
    c.place({{64, 40}, {100, 33}, {48, 20}}, random, 0);
    std::vector<std::int32_t> mean_tokens(static_cast<std::size_t>(c.input.num_pages), 16);
    spoil(c, mean_tokens);
    HostStep step(c, &mean_tokens);
    EXPECT_EQ(static_cast<CudaStepError>(step.error), expected);
    std::set<std::int32_t> listed;
    for (std::int32_t u = 0; u < step.num_units; ++u) {
      const AttentionUnit& unit = step.units[static_cast<std::size_t>(u)];
      if (unit.q_len > 0) listed.insert(unit.list_tokens - unit.past_tokens);  // C
    }
    const bool good = expected == CudaStepError::kNone;
    EXPECT_EQ(listed, good ? (std::set<std::int32_t>{40, 33, 20}) : (std::set<std::int32_t>{40, 20}));
  };
  using Tokens = std::vector<std::int32_t>;
  const auto page = [](StepCase& c, std::int32_t j) -> std::int32_t& {
    return c.page_tables[static_cast<std::size_t>(c.chunks[1].table_row * c.input.page_table_stride + j)];
  };
  run(CudaStepError::kNone, [](StepCase&, Tokens&) {});
  run(CudaStepError::kBadChunk, [](StepCase& c, Tokens&) { c.chunks[1].chunk_start = -1; });
  run(CudaStepError::kBadChunk, [](StepCase& c, Tokens&) { c.chunks[1].chunk_tokens = 2147483647; });
  run(CudaStepError::kBadChunk, [](StepCase& c, Tokens&) { c.chunks[1].q_begin = c.input.num_q_tokens; });
  run(CudaStepError::kBadChunk, [](StepCase& c, Tokens&) { c.chunks[1].table_row = 3; });
  run(CudaStepError::kBadPageId, [&](StepCase& c, Tokens&) { page(c, 8) = -1; });
  run(CudaStepError::kBadPageId, [&](StepCase& c, Tokens&) { page(c, 0) = c.input.num_pages; });
  run(CudaStepError::kStaleMean,
      [&](StepCase& c, Tokens& tokens) { tokens[static_cast<std::size_t>(page(c, 5))] = 15; });
  run(CudaStepError::kNone,  // a page of the chunk itself need not be complete
      [&](StepCase& c, Tokens& tokens) { tokens[static_cast<std::size_t>(page(c, 6))] = 15; });
}

// Chunks that share rows cannot overrun tables sized by rows.
TEST(StepCuda, SharedRowsAreReported) {
  StepRandom random(3);
  StepCase c;
  c.input.num_kv_heads = 1;
  c.input.num_q_heads = 1;
  c.input.page_tokens = 16;
  c.input.options.mode = UnionMode::kTile;
  c.place({{0, 64}, {0, 64}, {0, 64}}, random, 0);
  for (CudaChunk& chunk : c.chunks) chunk.q_begin = 0;
  c.input.num_q_tokens = 64;  // 4 blocks of 16 tokens, and two cut ones a chunk: room for 10
  c.follow_chunks();
  c.input.chunks = c.chunks.data();
  HostStep step(c);
  EXPECT_EQ(static_cast<CudaStepError>(step.error), CudaStepError::kTooManyRows);
  EXPECT_LE(step.tables().header->num_blocks, step.layout.sizes.max_blocks);
}

TEST(StepCuda, HostChecksNameTheField) {
  CudaStepInput good;
  good.num_chunks = 2;
  good.num_table_rows = 2;
  good.num_q_tokens = 100;
  good.max_context_tokens = 1000;
  good.page_table_stride = 8;
  good.num_q_heads = 8;
  good.num_kv_heads = 2;
  good.page_tokens = 128;
  good.num_pages = 20;
  ASSERT_TRUE(lay_out_step(good).ok());
  const auto expect = [&](StatusCode code, const char* message, auto&& spoil) {
    CudaStepInput input = good;
    spoil(input);
    const Status status = lay_out_step(input).status();
    EXPECT_EQ(status.code(), code) << message;
    EXPECT_NE(status.message().find(message), std::string::npos) << message << " not in: " << status.message();
  };
  constexpr StatusCode kWrong = StatusCode::kInvalidArgument, kMissing = StatusCode::kUnsupported;
  expect(kWrong, "num_chunks is -1", [](CudaStepInput& x) { x.num_chunks = -1; });
  expect(kWrong, "num_q_tokens is -1", [](CudaStepInput& x) { x.num_q_tokens = -1; });
  expect(kWrong, "num_pages is 0", [](CudaStepInput& x) { x.num_pages = 0; });
  expect(kWrong, "max_context_tokens is -5", [](CudaStepInput& x) { x.max_context_tokens = -5; });
  expect(kWrong, "page_table_stride is 7", [](CudaStepInput& x) { x.page_table_stride = 7; });
  expect(kWrong, "8 query heads and 3 KV heads", [](CudaStepInput& x) { x.num_kv_heads = 3; });
  expect(kWrong, "mask_heads is 4; 2 KV heads (or 0), or 8 query heads", [](CudaStepInput& x) { x.mask_heads = 4; });
  expect(kWrong, "block_tokens is 48", [](CudaStepInput& x) { x.block_tokens = 48; });
  expect(kMissing, "a row per query head", [](CudaStepInput& x) {
    x.mask_heads = 8;
    x.options.mode = UnionMode::kAdaptive;
    x.options.heads_per_unit = kCheapestHeads;
  });
  expect(kWrong, "heads_per_unit is 3", [](CudaStepInput& x) { x.options.heads_per_unit = 3; });
  expect(kWrong, "span_tokens is 0", [](CudaStepInput& x) { x.options.mode = UnionMode::kSpan; });
  expect(kWrong, "sink", [](CudaStepInput& x) { x.forced.sink_tokens = -1; });
  expect(kMissing, "page_tokens is 48", [](CudaStepInput& x) { x.page_tokens = 48; });
  expect(kMissing, "list_dropped", [](CudaStepInput& x) { x.options.list_dropped = true; });
  expect(kMissing, "258 query heads", [](CudaStepInput& x) { x.num_q_heads = 258, x.num_kv_heads = 1; });
  expect(kMissing, "max_context_tokens is 16777216",
         [](CudaStepInput& x) { x.max_context_tokens = 1 << 24, x.page_table_stride = 1 << 20; });
}

// A build without CUDA says so; one with CUDA needs no device for the sizes.
TEST(StepCuda, SizesNeedABuildWithCuda) {
  StepRandom random(1);
  StepCase c;
  make_random_step(c, random);
  const Result<CudaStepSizes> sizes = step_cuda_sizes(c.input);
  if (sizes.ok()) {
    EXPECT_EQ(sizes->workspace_bytes, lay_out_step(c.input)->sizes.workspace_bytes);
    return;
  }
  EXPECT_EQ(sizes.status().code(), StatusCode::kUnsupported);
  EXPECT_NE(sizes.status().message().find("COMPACT_CUDA"), std::string::npos);
  std::int32_t error = 0;
  EXPECT_EQ(plan_step_cuda(c.input, &error, nullptr, 0, nullptr).code(), StatusCode::kUnsupported);
  EXPECT_EQ(select_mean_key_cuda(c.input, {}, nullptr, nullptr, nullptr, 0, nullptr).code(), StatusCode::kUnsupported);
  EXPECT_EQ(build_page_lists_cuda(c.input, nullptr, {}, nullptr, 0, nullptr).code(), StatusCode::kUnsupported);
  EXPECT_EQ(page_means_cuda(c.input, {}, nullptr, nullptr, nullptr).code(), StatusCode::kUnsupported);
  EXPECT_EQ(page_summaries_cuda(c.input, {}, {}, nullptr).code(), StatusCode::kUnsupported);
  EXPECT_EQ(gate_pools_cuda(c.input, {}, {}, nullptr).code(), StatusCode::kUnsupported);
  EXPECT_EQ(select_cuda_bytes(c.input, {}).status().code(), StatusCode::kUnsupported);
  EXPECT_EQ(select_cuda(c.input, {}, nullptr, nullptr, nullptr, 0, nullptr, 0, nullptr).code(),
            StatusCode::kUnsupported);
}

}  // namespace
}  // namespace compact
