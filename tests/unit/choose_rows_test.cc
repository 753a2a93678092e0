// The budgets of the device on the CPU, by the code that runs on the device, against select_rows: from the same scores
// the same masks, bit for bit.
#include <gtest/gtest.h>

#include <array>
#include <limits>
#include <map>
#include <thread>

#include "tests/choose_case.h"

namespace compact {
namespace {

using testing::ChooseCase;
using testing::difference;
using testing::OneThread;
using testing::SharedSums;
using testing::StepRandom;
using testing::ThreadOfGroup;

// Every group that the device would launch, one after the other.
template <class Team>
void choose_all(const ChooseCase& c, const ChooseArgs& args, Team& team) {
  if (args.rule.kind == BudgetKind::kDensity && !keeps_all(args.rule, args.rule.value)) {
    for (std::int32_t b = 0; b < c.layout.shape.num_chunks; ++b) cut_chunk(team, args, b);
  }
  for (std::int32_t head = 0; head < args.rows.mask_heads; ++head) {
    for (std::int32_t i = 0; i < args.rows.max_blocks; ++i) choose_row(team, args, head, i);
  }
}

TEST(ChooseRows, TwoThousandStepsEqualTheCpu) {
  std::map<BudgetKind, std::int64_t> kept, pages;
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    StepRandom random(seed);
    ChooseCase c(random);
    std::vector<std::uint64_t> mask(static_cast<std::size_t>(c.layout.sizes.mask_words), ~std::uint64_t{0});
    std::uint64_t nonfinite_rows = 0;
    OneThread thread;
    choose_all(c, c.args(mask.data(), &nonfinite_rows), thread);
    ASSERT_EQ(difference(c, mask, nonfinite_rows), "") << "seed " << seed << ": " << c.text();
    BlockMask want;
    c.select_on_cpu(want);
    for (std::size_t i = 0; i < want.words.size(); ++i) kept[c.rule.kind] += std::popcount(want.words[i]);
    for (const QueryBlock& block : want.blocks) {
      pages[c.rule.kind] +=
          std::int64_t{want.mask_heads} *
          c.step.host_chunks[static_cast<std::size_t>(block.chunk)].num_past_pages(c.step.input.page_tokens);
    }
  }
  for (const auto& [kind, count] : kept) {  // neither nothing nor everything
    EXPECT_GT(count * 10, pages[kind]) << static_cast<int>(kind);
    EXPECT_LT(count * 10, 9 * pages[kind]) << static_cast<int>(kind);
  }
}

// What threads do together is what one does.
TEST(ChooseRows, ThreadsOfAGroupShareTheWork) {
  for (std::uint64_t seed = 10000; seed < 10020; ++seed) {
    StepRandom random(seed);
    ChooseCase c(random);
    std::vector<std::uint64_t> mask(static_cast<std::size_t>(c.layout.sizes.mask_words), ~std::uint64_t{0});
    std::uint64_t nonfinite_rows = 0;
    const ChooseArgs args = c.args(mask.data(), &nonfinite_rows);
    constexpr std::int32_t kThreads = 3;
    SharedSums shared(kThreads);
    std::vector<std::thread> threads;
    for (std::int32_t t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        ThreadOfGroup team{shared, t, kThreads};
        choose_all(c, args, team);
      });
    }
    for (std::thread& thread : threads) thread.join();
    ASSERT_EQ(difference(c, mask, nonfinite_rows), "") << "seed " << seed << ": " << c.text();
  }
}

TEST(ChooseRows, OrderedBitsAreInTheOrderOfScores) {
  constexpr std::array<float, 9> kAscending = {
      -std::numeric_limits<float>::infinity(), -3.0F, -1e-45F, 0.0F, 1e-45F, 1e-30F, 0.5F, 0.50000006F,
      std::numeric_limits<float>::max()};
  for (std::size_t i = 1; i < kAscending.size(); ++i) {
    EXPECT_LT(ordered_bits(kAscending[i - 1]), ordered_bits(kAscending[i])) << i;
    EXPECT_EQ(score_of(ordered_bits(kAscending[i])), kAscending[i]);
  }
  EXPECT_EQ(ordered_bits(-0.0F), ordered_bits(0.0F));
  EXPECT_GT(ordered_bits(kAscending[0]), 0U);
}

}  // namespace
}  // namespace compact
