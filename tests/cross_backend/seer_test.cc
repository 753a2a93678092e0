// The gate's CPU form against its reference, on every instruction set that this machine runs, for every layout of
// weights; and what holds for it as for every selector (ids of docs/design/method.md 8.4).
#include "src/select/seer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "src/select/row_product.h"
#include "tests/cross_backend/decisions.h"
#include "tests/cross_backend/targets.h"
#include "tests/fewer_when_sanitized.h"
#include "tests/kv_step.h"

namespace compact {
namespace {

using testing::Decisions;
using ::testing::HasSubstr;
using testing::KvStep;
using testing::KvStepSpec;
using testing::machine_targets;
using testing::OneTarget;
using testing::pages_of_row;
using testing::Random;
using testing::random_kv_step;

// Decisions this close to the threshold may differ: fp32 sums of some hundred parts against fp64, in the exponent.
constexpr double kBand = 1e-3;

enum Layout { kSingle, kDouble, kGroup };

std::shared_ptr<GateWeights> gates_of(const KvStepSpec& spec, Layout layout) {
  Random random(spec.page_seed + 17);
  auto gates = std::make_shared<GateWeights>();
  gates->num_layers = 2;
  gates->num_q_heads = spec.q_heads;
  gates->num_kv_heads = spec.kv_heads;
  gates->head_dim = spec.head_dim;
  gates->mask_heads = layout == kGroup ? spec.kv_heads : spec.q_heads;
  gates->key_heads = layout == kSingle ? spec.q_heads : spec.kv_heads;
  const auto dim = static_cast<std::size_t>(spec.head_dim);
  const auto fill = [&](std::size_t count, float scale) {
    std::vector<float> values(count);
    for (float& value : values) value = random.real() * scale;
    return values;
  };
  gates->key = fill(2 * static_cast<std::size_t>(gates->key_heads) * 3 * dim * dim, 0.5F / static_cast<float>(dim));
  if (layout != kSingle) {
    gates->query =
        fill(2 * static_cast<std::size_t>(spec.q_heads) * dim * dim, 1.0F / std::sqrt(static_cast<float>(dim)));
  }
  for (std::size_t i = 0; i < dim / 2; ++i) {
    gates->inverse_frequencies.push_back(std::pow(10000.0F, -static_cast<float>(2 * i) / static_cast<float>(dim)));
  }
  return gates;
}

KvStepSpec spec_of(std::uint64_t seed) {
  KvStepSpec spec = random_kv_step(seed);
  spec.page_tokens = seed % 2 == 0 ? 64 : 128;
  for (testing::ChunkSpec& chunk : spec.chunks) chunk.start = static_cast<std::int32_t>(chunk.start * 7 % 1300);
  spec.summaries = {.gate_pool = true};
  return spec;
}

SelectInput input_of(const KvStep& step, std::int32_t layer = 1) {
  SelectInput input = step.select_input();
  input.layer = layer;
  return input;
}

BlockMask select(const SelectInput& input, const SeerOptions& options, std::int32_t threads = 2,
                 const Budget& budget = {}) {
  ThreadPool pool(threads);
  BlockMask mask;
  const Status status = select_seer_cpu(input, options, mask, pool, budget);
  EXPECT_TRUE(status.ok()) << status.message();
  return mask;
}

TEST(SeerBackends, DecisionsAgreeOutsideTheBand) {
  Decisions decisions;
  ThreadPool pool(2);
  for (std::uint64_t seed = 1; seed <= testing::fewer_when_sanitized(60); ++seed) {
    const KvStep step(spec_of(seed));
    const SeerOptions options{.threshold = 0.08F, .gates = gates_of(step.spec(), static_cast<Layout>(seed % 3))};
    const SelectInput input = input_of(step);
    BlockMask reference;
    std::vector<double> margins;
    const Status made = select_seer_reference(input, options, reference, &margins);
    ASSERT_TRUE(made.ok()) << made.message();
    for (const std::int64_t target : machine_targets()) {
      const OneTarget one(target);
      BlockMask mask;
      const Status status = select_seer_cpu(input, options, mask, pool);
      ASSERT_TRUE(status.ok()) << status.message();
      ASSERT_EQ(decisions.add(mask, reference, margins, kBand), "")
          << hwy::TargetName(target) << ": seed " << seed << " " << step.spec().describe();
    }
  }
  EXPECT_GT(decisions.kept, decisions.all / 20) << "a test of decisions needs both kinds";
  EXPECT_LT(decisions.kept, decisions.all * 19 / 20);
  EXPECT_LT(decisions.in_band, decisions.all / 100);
}

// I10: physical order, the rest of the batch, and threads change nothing.
TEST(Seer, SeesTokensOnly) {
  for (std::uint64_t seed = 1; seed <= 12; ++seed) {
    KvStepSpec spec = spec_of(seed);
    const SeerOptions options{.threshold = 0.08F, .gates = gates_of(spec, static_cast<Layout>(seed % 3))};
    SCOPED_TRACE("seed " + std::to_string(seed) + " " + spec.describe());
    const BlockMask batch = select(input_of(KvStep(spec)), options, 1);
    spec.page_seed += 1;
    spec.append_tokens = 50;
    ASSERT_EQ(batch.words, select(input_of(KvStep(spec)), options, 3).words);
    std::int32_t first_block = 0;
    for (const testing::ChunkSpec& chunk : std::vector<testing::ChunkSpec>(spec.chunks)) {
      spec.chunks = {chunk};
      const BlockMask alone = select(input_of(KvStep(spec)), options);
      for (std::int32_t head = 0; head < alone.mask_heads; ++head) {
        for (std::int32_t i = 0; i < static_cast<std::int32_t>(alone.blocks.size()); ++i) {
          ASSERT_EQ(pages_of_row(alone, head, i), pages_of_row(batch, head, first_block + i)) << "block " << i;
        }
      }
      first_block += static_cast<std::int32_t>(alone.blocks.size());
    }
  }
}

// I6: chunk edges that do not cut a block do not change its row.
TEST(Seer, ChunkEdgesThatCutNoBlockChangeNothing) {
  for (std::uint64_t seed = 1; seed <= 9; ++seed) {
    KvStepSpec spec = spec_of(seed);
    const std::int32_t start = spec.page_tokens * 3 + 5;
    const std::int32_t end = start + 5 * spec.page_tokens + 3;
    spec.chunks = {{start, end - start, 9}};
    const SeerOptions options{.threshold = 0.05F, .gates = gates_of(spec, static_cast<Layout>(seed % 3))};
    SCOPED_TRACE("seed " + std::to_string(seed) + " " + spec.describe());
    const BlockMask whole = select(input_of(KvStep(spec)), options);
    std::int64_t compared = 0;
    for (const std::int32_t chunk_tokens : {spec.page_tokens, 100}) {
      for (std::int32_t begin = start; begin < end; begin += chunk_tokens) {
        spec.chunks = {{begin, std::min(chunk_tokens, end - begin), 9}};
        const BlockMask part = select(input_of(KvStep(spec)), options);
        for (std::int32_t i = 0; i < static_cast<std::int32_t>(part.blocks.size()); ++i) {
          for (std::int32_t w = 0; w < static_cast<std::int32_t>(whole.blocks.size()); ++w) {
            const QueryBlock& a = whole.blocks[static_cast<std::size_t>(w)];
            const QueryBlock& b = part.blocks[static_cast<std::size_t>(i)];
            if (a.first_position != b.first_position || a.tokens != b.tokens) continue;
            ++compared;
            for (std::int32_t head = 0; head < part.mask_heads; ++head) {
              std::vector<std::int32_t> pages = pages_of_row(part, head, i);
              std::erase_if(pages, [&](std::int32_t page) { return page >= start / spec.page_tokens; });
              ASSERT_EQ(pages, pages_of_row(whole, head, w)) << "position " << a.first_position;
            }
          }
        }
      }
    }
    EXPECT_GT(compared, 2);
  }
}

// I3: a threshold of 0 and full budgets keep every page; I5: a larger threshold never adds one.
TEST(Seer, KeepsAllWhenAskedToAndLessWithEveryThreshold) {
  for (std::uint64_t seed = 1; seed <= 9; ++seed) {
    const KvStep step(spec_of(seed));
    SeerOptions options{.gates = gates_of(step.spec(), static_cast<Layout>(seed % 3))};
    const SelectInput input = input_of(step);
    options.threshold = 0;
    const BlockMask all = select(input, options);
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(all.blocks.size()); ++i) {
      const auto chunk = static_cast<std::size_t>(all.blocks[static_cast<std::size_t>(i)].chunk);
      const auto past = static_cast<std::size_t>(input.chunks[chunk].num_past_pages(input.page_tokens));
      for (std::int32_t head = 0; head < all.mask_heads; ++head) ASSERT_EQ(pages_of_row(all, head, i).size(), past);
    }
    for (const BudgetKind kind : {BudgetKind::kTopN, BudgetKind::kMass, BudgetKind::kDensity}) {
      ASSERT_EQ(select(input, options, 1, {.kind = kind, .value = 1}).words, all.words);
    }
    std::vector<std::uint64_t> larger = all.words;
    for (const float threshold : {1e-6F, 0.01F, 0.1F, 0.5F}) {
      options.threshold = threshold;
      const BlockMask mask = select(input, options);
      for (std::size_t w = 0; w < larger.size(); ++w) ASSERT_EQ(mask.words[w] & ~larger[w], 0U);
      larger = mask.words;
    }
  }
}

TEST(Seer, ThresholdIsStrict) {
  // One block of the past and the query's own, with equal keys: both have probability 1/2, exactly.
  KvStepSpec spec{.q_heads = 1, .kv_heads = 1, .head_dim = 8, .page_tokens = 64, .chunks = {{64, 64, 3}}};
  spec.summaries = {.gate_pool = true};
  const KvStep step(spec);
  auto gates = gates_of(spec, kSingle);
  gates->key.assign(gates->key.size(), 0.0F);
  const auto kept = [&](float threshold) {
    return pages_of_row(select(input_of(step), {.threshold = threshold, .gates = gates}), 0, 0).size();
  };
  EXPECT_EQ(kept(0.5F), 0U);
  EXPECT_EQ(kept(std::nextafter(0.5F, 0.0F)), 1U);
}

TEST(Seer, ANonFiniteRowKeepsItsPagesAndIsCounted) {
  KvStepSpec spec{.q_heads = 2, .kv_heads = 1, .head_dim = 8, .page_tokens = 64, .chunks = {{256, 128, 3}}};
  spec.summaries = {.gate_pool = true};
  const KvStep step(spec);
  const auto gates = gates_of(spec, kSingle);
  SelectInput input = input_of(step);
  std::vector<float> q_pre(input.q_pre.data, input.q_pre.data + input.q_pre.tokens * input.q_pre.token_stride);
  input.q_pre.data = q_pre.data();
  const ChunkView& chunk = input.chunks[0];
  const std::int64_t at = (chunk.q_begin + 70) * input.q_pre.token_stride + input.q_pre.head_stride;  // head 1, block 1
  q_pre[static_cast<std::size_t>(at)] = std::numeric_limits<float>::quiet_NaN();
  const BlockMask mask = select(input, {.threshold = 0.9F, .gates = gates});
  EXPECT_EQ(mask.nonfinite_rows, 64);
  EXPECT_EQ(pages_of_row(mask, 1, 1).size(), 4U);
  EXPECT_LT(pages_of_row(mask, 1, 0).size(), 4U);
  EXPECT_LT(pages_of_row(mask, 0, 1).size(), 4U);
}

TEST(Seer, NamesWhatIsWrong) {
  KvStepSpec spec{.q_heads = 2, .kv_heads = 1, .head_dim = 8, .page_tokens = 64, .chunks = {{128, 10, 3}}};
  spec.summaries = {.gate_pool = true};
  const KvStep step(spec);
  const auto message = [&](const SelectInput& input, const SeerOptions& options) {
    ThreadPool pool(1);
    BlockMask mask;
    return select_seer_cpu(input, options, mask, pool).message();
  };
  const SelectInput good = input_of(step);
  const auto gates = gates_of(spec, kSingle);
  EXPECT_EQ(message(good, {.gates = gates}), "");
  EXPECT_THAT(message(good, {.gates = nullptr}), HasSubstr("seer: no gates"));
  EXPECT_THAT(message(good, {.threshold = 1, .gates = gates}), HasSubstr("threshold is 1"));
  EXPECT_THAT(message(input_of(step, 2), {.gates = gates}), HasSubstr("seer: layer 2"));
  auto short_keys = std::make_shared<GateWeights>(*gates);
  short_keys->key.pop_back();
  EXPECT_THAT(message(good, {.gates = short_keys}), HasSubstr("767 key, 0 query weights"));
  auto wrong_heads = std::make_shared<GateWeights>(*gates);
  wrong_heads->mask_heads = 3;
  EXPECT_THAT(message(good, {.gates = wrong_heads}), HasSubstr("3 mask heads"));
  SelectInput input = good;
  input.q_pre = {};
  EXPECT_THAT(message(input, {.gates = gates}), HasSubstr("queries before RoPE of 0 tokens"));
  const KvStep without({.q_heads = 2, .kv_heads = 1, .head_dim = 8, .page_tokens = 64, .chunks = {{128, 10, 3}}});
  EXPECT_THAT(message(input_of(without), {.gates = gates}), HasSubstr("keeps no gate pools"));
}

TEST(RowProduct, EqualsTheSumOverAnyShape) {
  Random random(5);
  for (const std::int64_t target : machine_targets()) {
    const OneTarget one(target);
    for (const auto& [num_rows, depth, width] :
         std::vector<std::array<std::int32_t, 3>>{{1, 1, 1}, {4, 7, 16}, {5, 24, 23}, {9, 64, 128}, {3, 3, 50}}) {
      std::vector<float> values(static_cast<std::size_t>(num_rows * depth));
      std::vector<float> matrix(static_cast<std::size_t>(depth * width));
      for (float& value : values) value = random.real();
      for (float& value : matrix) value = random.real();
      std::vector<const float*> rows;
      for (std::int32_t i = 0; i < num_rows; ++i) rows.push_back(values.data() + i * depth);
      std::vector<float> out(static_cast<std::size_t>(num_rows * width));
      multiply_rows(rows, depth, matrix.data(), width, out.data());
      for (std::int32_t i = 0; i < num_rows; ++i) {
        for (std::int32_t c = 0; c < width; ++c) {
          double sum = 0;
          for (std::int32_t x = 0; x < depth; ++x) {
            sum +=
                double{rows[static_cast<std::size_t>(i)][x]} * double{matrix[static_cast<std::size_t>(x * width + c)]};
          }
          ASSERT_NEAR(out[static_cast<std::size_t>(i * width + c)], sum, 1e-5 * depth)
              << hwy::TargetName(target) << " row " << i << " column " << c << " width " << width;
        }
      }
    }
  }
}

}  // namespace
}  // namespace compact
