#include "src/select/budget.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

namespace compact {
namespace {

using ::testing::HasSubstr;

TEST(Budget, TextNamesTheKindAndTheLimits) {
  const Budget mass = parse_budget("mass=0.95,min=2,max=40").value();
  EXPECT_EQ(mass.kind, BudgetKind::kMass);
  EXPECT_EQ(mass.value, 0.95F);
  EXPECT_EQ(mass.min_pages, 2);
  EXPECT_EQ(mass.max_pages, 40);
  EXPECT_EQ(parse_budget("native").value().kind, BudgetKind::kNative);
  EXPECT_EQ(parse_budget("native,max=3").value().max_pages, 3);
  EXPECT_EQ(parse_budget("top=0.1").value().kind, BudgetKind::kTopN);
  EXPECT_EQ(parse_budget("density=1").value().kind, BudgetKind::kDensity);
  EXPECT_EQ(parse_budget("threshold=1e-3").value().value, 1e-3F);
}

TEST(Budget, BadTextIsNamed) {
  for (const char* text :
       {"", "mass", "mass=", "mass=x", "max=3", "mass=0.5,most=3", "mass=0.5;min=2", "native=3", "mass=0.5,min=1.5"}) {
    const Status status = parse_budget(text).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(status.message(), HasSubstr("budget is '" + std::string(text) + "'"));
  }
  EXPECT_THAT(parse_budget("mass=1.5").status().message(), HasSubstr("mass of pages is 1.5; allowed: 0 to 1"));
  EXPECT_THAT(parse_budget("top=-1").status().message(), HasSubstr("is -1; allowed: 0 to 1"));
  EXPECT_THAT(parse_budget("density=nan").status().message(), HasSubstr("nan"));
  EXPECT_THAT(parse_budget("top=0.5,min=4,max=2").status().message(), HasSubstr("min_pages is 4 and max_pages 2"));
}

TEST(Budget, TopCountsADecimalShareAsWritten) {
  // 0.1F is a little more than a tenth: rounding up must not make 11 of 100 pages of it.
  EXPECT_EQ(top_pages(0.1F, 100), 10);
  EXPECT_EQ(top_pages(0.1F, 101), 11);
  EXPECT_EQ(top_pages(0.3F, 10), 3);
  EXPECT_EQ(top_pages(0.7F, 1000), 700);
  EXPECT_EQ(top_pages(0.0F, 50), 0);
  EXPECT_EQ(top_pages(1e-9F, 50), 1);
  EXPECT_EQ(top_pages(1.0F, 16384), 16384);
}

TEST(Budget, TiesGoToTheLowerPage) {
  const std::vector<float> scores(10, 0.1F);
  std::uint64_t words = 0;
  BudgetScratch().decide(BudgetKind::kTopN, 0.3F, {}, {.scores = scores, .forced = {}, .words = &words});
  EXPECT_EQ(words, 0b111U);
}

TEST(Budget, ForcedPagesCountFirstAndOnce) {
  // Half of the mass lies in page 0, which is forced as sink and as window: only a fifth is still to be found.
  const std::vector<float> scores = {0.5F, 0.1F, 0.2F, 0.2F};
  std::uint64_t words = 0;
  const ForcedRanges forced{.sink_end = 1, .window_begin = 0, .window_end = 1};
  BudgetScratch().decide(BudgetKind::kMass, 0.69F, {}, {.scores = scores, .forced = forced, .words = &words});
  EXPECT_EQ(words, 0b100U);
  words = 0;  // mass that the chunk holds counts too
  BudgetScratch().decide(BudgetKind::kMass, 0.69F, {},
                         {.scores = scores, .forced = forced, .elsewhere = 1.0F, .words = &words});
  EXPECT_EQ(words, 0U);
}

}  // namespace
}  // namespace compact
