// The CPU form of the mean-key rule against its reference, on every instruction set that this machine runs.
#include "src/select/mean_key.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "tests/cross_backend/decisions.h"
#include "tests/cross_backend/targets.h"
#include "tests/fewer_when_sanitized.h"
#include "tests/unit/select_step.h"

namespace compact {
namespace {

using testing::Decisions;
using testing::machine_targets;
using testing::OneTarget;
using testing::SelectStep;
using testing::StepSpec;

// Decisions this close to the threshold may differ: fp32 sums of up to 200 scores against fp64.
constexpr double kBand = 1e-4;

struct Case {
  StepSpec spec;
  MeanKeyOptions options;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  std::mt19937_64 engine(5);
  const auto below = [&](std::int32_t end) {
    return static_cast<std::int32_t>(engine() % static_cast<std::uint64_t>(end));
  };
  for (const std::int32_t group : {1, 2, 4, 7, 8}) {
    for (const std::int32_t head_dim : {8, 80, 128}) {
      for (const char* preset : {"mean-key", "compact", "flashprefill-v1", "flashprefill-v2"}) {
        Case c;
        c.spec.kv_heads = 1 + below(2);
        c.spec.q_heads = group * c.spec.kv_heads;
        c.spec.head_dim = head_dim;
        c.spec.page_tokens = below(3) == 0 ? 128 : 16;
        c.spec.amplitude = 40.0F / std::sqrt(static_cast<float>(head_dim)) / 2;
        // Ragged, one that starts inside a page, one without past, one empty.
        c.spec.chunks = {{c.spec.page_tokens * (20 + below(90)) + below(16), 1 + below(100), 1},
                         {c.spec.page_tokens * 3, 130, 2},
                         {5, 9, 3},
                         {70, 0, 4}};
        c.options = *mean_key_preset(preset);
        all.push_back(c);
      }
    }
  }
  // A stride of seven (1 or 7), prime to the numbers of presets and dimensions, still meets each of them with every
  // group.
  const std::size_t stride = all.size() / testing::fewer_when_sanitized(static_cast<std::uint32_t>(all.size()));
  std::vector<Case> some;
  for (std::size_t i = 0; i < all.size(); i += stride) some.push_back(all[i]);
  return some;
}

TEST(MeanKeyBackends, DecisionsAgreeOutsideTheBand) {
  const std::vector<std::int64_t> targets = machine_targets();
  Decisions decisions;
  ThreadPool pool(2);
  for (const Case& c : cases()) {
    const SelectStep step(c.spec);
    BlockMask reference;
    std::vector<double> margins;
    ASSERT_TRUE(select_mean_key_reference(step.select_input(), c.options, reference, nullptr, &margins).ok());
    for (const std::int64_t target : targets) {
      const OneTarget one(target);
      BlockMask mask;
      const Status status = select_mean_key_cpu(step.select_input(), c.options, mask, pool);
      ASSERT_TRUE(status.ok()) << status.message();
      ASSERT_EQ(decisions.add(mask, reference, margins, kBand), "")
          << hwy::TargetName(target) << ": Hq " << c.spec.q_heads << ", Hkv " << c.spec.kv_heads << ", D "
          << c.spec.head_dim << ", P " << c.spec.page_tokens;
    }
  }
  EXPECT_LT(decisions.in_band * 1000, decisions.all);  // the band is no excuse
}

TEST(MeanKeyBackends, ThreadsDoNotChangeBits) {
  const std::vector<Case> all = cases();
  for (std::size_t i = 0; i < all.size(); i += 3) {
    const Case& c = all[i];
    const SelectStep step(c.spec);
    BlockMask one;
    ThreadPool single(1);
    ASSERT_TRUE(select_mean_key_cpu(step.select_input(), c.options, one, single).ok());
    for (const std::int32_t threads : {2, 3, 8}) {
      ThreadPool pool(threads);
      BlockMask many;
      ASSERT_TRUE(select_mean_key_cpu(step.select_input(), c.options, many, pool).ok());
      ASSERT_EQ(one.words, many.words) << threads << " threads";
    }
  }
}

TEST(MeanKeyBackends, NonFiniteRowsAgree) {
  for (const Case& c : cases()) {
    SelectStep step(c.spec);
    const std::int32_t token = c.spec.chunks[0].tokens / 2;
    step.query(0, token, c.spec.q_heads - 1)[3] = std::numeric_limits<float>::quiet_NaN();
    step.mean(1, 1, 0)[2] = std::numeric_limits<float>::infinity();
    BlockMask reference;
    ASSERT_TRUE(select_mean_key_reference(step.select_input(), c.options, reference).ok());
    EXPECT_GT(reference.nonfinite_rows, 0);
    for (const std::int64_t target : machine_targets()) {
      const OneTarget one(target);
      BlockMask mask;
      ThreadPool pool(1);
      ASSERT_TRUE(select_mean_key_cpu(step.select_input(), c.options, mask, pool).ok());
      ASSERT_EQ(mask.nonfinite_rows, reference.nonfinite_rows) << hwy::TargetName(target);
    }
  }
}

}  // namespace
}  // namespace compact
