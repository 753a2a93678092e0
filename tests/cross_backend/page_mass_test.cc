// Exact page masses against loops in fp64, on every instruction set that this machine runs.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "tests/cross_backend/targets.h"
#include "tests/fewer_when_sanitized.h"
#include "tests/kv_step.h"
#include "tests/mass_reference.h"

namespace compact {
namespace {

using ::testing::HasSubstr;
using testing::KvStep;
using testing::KvStepSpec;
using testing::machine_targets;
using testing::OneTarget;
using testing::random_kv_step;
using testing::reference_mass;

// fp32 scores of up to some ten in magnitude: their rounding enters the exponential.
constexpr double kTolerance = 2e-5;

// Every result (one per instruction set) against the reference.
void expect_masses(const PageMassInput& input, const std::vector<PageMass>& results) {
  for (std::int32_t head = 0; head < results[0].num_heads; ++head) {
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(results[0].blocks.size()); ++i) {
      const QueryBlock& block = results[0].blocks[static_cast<std::size_t>(i)];
      const std::int32_t past_pages =
          input.chunks[static_cast<std::size_t>(block.chunk)].num_past_pages(input.kv.page_tokens);
      const std::vector<double> expected = reference_mass(input, head, block);
      for (const PageMass& mass : results) {
        SCOPED_TRACE("head " + std::to_string(head) + " block " + std::to_string(i) + " result " +
                     std::to_string(&mass - results.data()));
        double chunk = 0;
        for (std::int32_t j = 0; j < static_cast<std::int32_t>(expected.size()); ++j) {
          const double page = expected[static_cast<std::size_t>(j)];
          if (j >= past_pages) {
            chunk = input.aggregate == MassAggregate::kMean ? chunk + page : std::max(chunk, page);
          } else {
            ASSERT_NEAR(mass.past_row(head, i)[j], page, kTolerance) << "page " << j;
          }
        }
        for (std::int32_t j = past_pages; j < mass.pages_per_row; ++j) ASSERT_EQ(mass.past_row(head, i)[j], 0.0F);
        ASSERT_NEAR(mass.chunk_mass(head, i), chunk, kTolerance);
      }
    }
  }
}

TEST(PageMass, EqualsTheReferenceOnEveryInstructionSet) {
  ThreadPool pool(2);
  for (std::uint64_t seed = 1; seed <= testing::fewer_when_sanitized(40); ++seed) {
    const KvStep step(random_kv_step(seed));
    PageMassInput input = step.mass_input(seed % 3 == 0 ? 32 : 128);
    input.aggregate = seed % 4 == 0 ? MassAggregate::kMax : MassAggregate::kMean;
    SCOPED_TRACE("seed " + std::to_string(seed) + " " + step.spec().describe());
    std::vector<PageMass> results;
    for (const std::int64_t target : machine_targets()) {
      const OneTarget one(target);
      const Status status = compute_page_mass(input, results.emplace_back(), pool);
      ASSERT_TRUE(status.ok()) << status.message();
      for (const std::int32_t rows : results.back().nonfinite) EXPECT_EQ(rows, 0);
    }
    expect_masses(input, results);
    if (HasFatalFailure()) return;
  }
}

TEST(PageMass, BlocksLongerThanATileAreWhole) {
  const KvStep step({.q_heads = 2, .kv_heads = 1, .chunks = {{70, 400, 5}}});
  const PageMassInput input = step.mass_input(512);
  PageMass mass;
  ThreadPool pool(1);
  ASSERT_TRUE(compute_page_mass(input, mass, pool).ok());
  ASSERT_EQ(mass.blocks.size(), 1U);
  expect_masses(input, {mass});
}

TEST(PageMass, ThreadsAndPhysicalPagesDoNotChangeBits) {
  for (std::uint64_t seed = 100; seed < 110; ++seed) {
    KvStepSpec spec = random_kv_step(seed);
    PageMass one;
    ThreadPool single(1);
    ASSERT_TRUE(compute_page_mass(KvStep(spec).mass_input(128), one, single).ok());
    spec.page_seed += 1;
    const KvStep permuted(spec);
    for (const std::int32_t threads : {2, 5}) {
      ThreadPool pool(threads);
      PageMass many;
      ASSERT_TRUE(compute_page_mass(permuted.mass_input(128), many, pool).ok());
      ASSERT_EQ(one.past, many.past) << "seed " << seed;
      ASSERT_EQ(one.chunk, many.chunk) << "seed " << seed;
    }
  }
}

// A block that lies in one chunk has the same masses in every chunking, bit for bit.
TEST(PageMass, DoesNotDependOnTheChunk) {
  ThreadPool pool(1);
  PageMass whole;
  ASSERT_TRUE(compute_page_mass(KvStep({.chunks = {{256, 384, 7}}}).mass_input(128), whole, pool).ok());
  PageMass part;
  ASSERT_TRUE(compute_page_mass(KvStep({.chunks = {{384, 128, 7}}}).mass_input(128), part, pool).ok());
  for (std::int32_t head = 0; head < 4; ++head) {
    for (std::int32_t j = 0; j < 256 / 16; ++j) ASSERT_EQ(whole.past_row(head, 1)[j], part.past_row(head, 0)[j]);
  }
}

TEST(PageMass, NonFiniteRowsAreCountedAndMarked) {
  KvStep step({.chunks = {{64, 40, 3}}});
  step.query(0, 33, 1)[0] = std::numeric_limits<float>::quiet_NaN();
  PageMass mass;
  ThreadPool pool(1);
  ASSERT_TRUE(compute_page_mass(step.mass_input(32), mass, pool).ok());
  EXPECT_EQ(mass.nonfinite[static_cast<std::size_t>(mass.row_index(1, 1))], 1);
  EXPECT_EQ(std::accumulate(mass.nonfinite.begin(), mass.nonfinite.end(), 0), 1);
  EXPECT_TRUE(std::isnan(mass.past_row(1, 1)[0]));
  EXPECT_TRUE(std::isnan(mass.chunk_mass(1, 1)));
  EXPECT_FALSE(std::isnan(mass.past_row(1, 0)[0]));
  EXPECT_FALSE(std::isnan(mass.past_row(0, 1)[0]));
}

TEST(PageMass, BadInputIsNamed) {
  KvStep step({.chunks = {{64, 40, 3}}});
  PageMass mass;
  ThreadPool pool(1);
  const auto message = [&](const std::function<void(PageMassInput&)>& spoil) {
    PageMassInput input = step.mass_input(32);
    spoil(input);
    const Status status = compute_page_mass(input, mass, pool);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  EXPECT_THAT(message([](PageMassInput& in) { in.block_tokens = 48; }), HasSubstr("block_tokens is 48"));
  EXPECT_THAT(message([](PageMassInput& in) { in.kv.num_kv_heads = 3; }), HasSubstr("4 query heads and 3 KV heads"));
  EXPECT_THAT(message([](PageMassInput& in) { in.kv.head_dim = 16; }), HasSubstr("8 in Q and 16 in the K cache"));
  EXPECT_THAT(message([](PageMassInput& in) { in.kv.k = nullptr; }), HasSubstr("no K cache"));
  EXPECT_THAT(message([](PageMassInput& in) { in.kv.num_pages = 2; }), HasSubstr("page table entry"));
  EXPECT_THAT(message([](PageMassInput& in) { in.softmax_scale = 0; }), HasSubstr("softmax_scale is 0"));
  EXPECT_THAT(message([](PageMassInput& in) { in.q.data = nullptr; }), HasSubstr("Q is null"));
  EXPECT_THAT(message([](PageMassInput& in) { in.q.tokens = 10; }), HasSubstr("takes 40 rows of Q"));
}

TEST(PageMass, NoTokensIsSuccess) {
  const KvStep step({.chunks = {{64, 0, 3}}});
  PageMass mass;
  ThreadPool pool(1);
  EXPECT_TRUE(compute_page_mass(step.mass_input(32), mass, pool).ok());
  EXPECT_TRUE(mass.blocks.empty());
}

}  // namespace
}  // namespace compact
