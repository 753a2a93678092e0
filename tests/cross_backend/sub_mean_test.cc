// The CPU form of the sub-mean rule against its reference, on every instruction set that this machine runs.
#include "src/select/sub_mean.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "src/core/bit_words.h"
#include "tests/cross_backend/decisions.h"
#include "tests/cross_backend/targets.h"
#include "tests/fewer_when_sanitized.h"
#include "tests/kv_step.h"

namespace compact {
namespace {

using testing::Decisions;
using testing::KvStep;
using testing::KvStepSpec;
using testing::machine_targets;
using testing::OneTarget;
using testing::random_kv_step;

// Decisions this close to the threshold may differ: fp32 sums of some hundred parts against fp64.
constexpr double kBand = 1e-4;

KvStepSpec spec_of(std::uint64_t seed) {
  KvStepSpec spec = random_kv_step(seed);
  spec.summaries = {.sub_mean_k = true};
  return spec;
}

SubMeanOptions options_of(std::uint64_t seed) {
  SubMeanOptions options;
  options.share = seed % 3 == 0 ? 0.1F : 0.25F;
  options.lift = seed % 2 == 0 ? 0.0F : 1.2F;
  options.temperature = seed % 5 == 0 ? 1.0F : 2.0F;
  options.peak_weight = seed % 7 == 0 ? 0.0F : 0.125F;
  return options;
}

TEST(SubMeanBackends, DecisionsAgreeOutsideTheBand) {
  Decisions decisions;
  ThreadPool pool(2);
  for (std::uint64_t seed = 1; seed <= testing::fewer_when_sanitized(300); ++seed) {
    const KvStep step(spec_of(seed));
    const SelectInput input = step.select_input();
    BlockMask reference;
    std::vector<double> margins;
    ASSERT_TRUE(select_sub_mean_reference(input, options_of(seed), reference, &margins).ok());
    for (const std::int64_t target : machine_targets()) {
      const OneTarget one(target);
      BlockMask mask;
      const Status status = select_sub_mean_cpu(input, options_of(seed), mask, pool);
      ASSERT_TRUE(status.ok()) << status.message();
      ASSERT_EQ(decisions.add(mask, reference, margins, kBand), "")
          << hwy::TargetName(target) << ": seed " << seed << " " << step.spec().describe();
    }
  }
  EXPECT_LT(decisions.in_band * 500, decisions.all);  // the band is no excuse
  EXPECT_GT(decisions.kept * 20, decisions.all);
  EXPECT_LT(decisions.kept * 2, decisions.all);
}

TEST(SubMeanBackends, NonFiniteRowsAgree) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    KvStepSpec spec = spec_of(seed);
    spec.chunks = {{spec.page_tokens * 3 + 5, 70, 2}};
    KvStep step(spec);
    step.query(0, 30, spec.q_heads - 1)[3] = std::numeric_limits<float>::quiet_NaN();
    BlockMask reference;
    ASSERT_TRUE(select_sub_mean_reference(step.select_input(), options_of(seed), reference).ok());
    EXPECT_EQ(reference.nonfinite_rows, 1);
    for (const std::int64_t target : machine_targets()) {
      const OneTarget one(target);
      BlockMask mask;
      ThreadPool pool(1);
      ASSERT_TRUE(select_sub_mean_cpu(step.select_input(), options_of(seed), mask, pool).ok());
      ASSERT_EQ(mask.nonfinite_rows, 1) << hwy::TargetName(target);
    }
  }
}

// With a probe at every token, the pages are those where any row has the mass: exact masses say which.
TEST(SubMeanBackends, ProbesAreExactMasses) {
  for (std::uint64_t seed = 1; seed <= 30; ++seed) {
    const KvStep step(spec_of(seed));
    SelectInput input = step.select_input();
    SubMeanOptions options;
    options.share = 1.0F;  // and a peak of a tenth at most: the rule itself keeps nothing
    options.lift = 1e9F;
    options.peak_weight = 0.0F;
    options.probe_stride = seed % 3 == 0 ? 3 : 1;
    options.probe_mass = 0.07F;
    ThreadPool pool(2);
    BlockMask mask;
    const Status status = select_sub_mean_cpu(input, options, mask, pool);
    ASSERT_TRUE(status.ok()) << status.message();
    PageMassInput mass_input = step.mass_input(1);
    PageMass mass;
    ASSERT_TRUE(compute_page_mass(mass_input, mass, pool).ok());
    const std::int32_t group = step.spec().q_heads / step.spec().kv_heads;
    for (std::int32_t head = 0; head < mask.mask_heads; ++head) {
      for (std::int32_t i = 0; i < static_cast<std::int32_t>(mask.blocks.size()); ++i) {
        const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
        const std::int32_t past = input.chunks[static_cast<std::size_t>(block.chunk)].num_past_pages(input.page_tokens);
        for (std::int32_t j = 0; j < past; ++j) {
          float largest = 0;
          for (std::int32_t m = 0; m < static_cast<std::int32_t>(mass.blocks.size()); ++m) {
            const QueryBlock& token = mass.blocks[static_cast<std::size_t>(m)];
            if (token.chunk != block.chunk || token.first_position < block.first_position ||
                token.first_position >= block.first_position + block.tokens ||
                (token.first_position + 1) % options.probe_stride != 0) {
              continue;
            }
            for (std::int32_t h = 0; h < group; ++h) {
              largest = std::max(largest, mass.past_row(head * group + h, m)[j]);
            }
          }
          if (std::abs(largest - options.probe_mass) < 1e-5F) continue;
          ASSERT_EQ(test_bit(mask.row(head, i), j), largest >= options.probe_mass)
              << "seed " << seed << " " << step.spec().describe() << " head " << head << " block " << i << " page "
              << j;
        }
      }
    }
  }
}

}  // namespace
}  // namespace compact
