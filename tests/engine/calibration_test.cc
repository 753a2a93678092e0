// What `compact calibrate` rests on: which step of the ladder each head takes, and its file.
#include "engine/eval/calibration.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

namespace compact::engine {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

using Curves = std::vector<std::vector<KeptShare>>;

// Two heads: the first keeps its mass with few pages, the second needs many.
const Curves kCurves = {{{1.0, 1.0}, {0.5, 0.99}, {0.1, 0.98}, {0.05, 0.6}},
                        {{1.0, 1.0}, {0.5, 0.8}, {0.1, 0.3}, {0.05, 0.2}}};

TEST(Calibration, PagesGoWhereTheyBringMostMass) {
  EXPECT_THAT(steps_at_price(kCurves, 1e-9), ElementsAre(0, 0)) << "pages cost nothing";
  EXPECT_THAT(steps_at_price(kCurves, 1.0), ElementsAre(2, 1)) << "0.38 of mass for 0.05 of pages, but 0.2 for 0.5";
  EXPECT_THAT(steps_at_price(kCurves, 1e6), ElementsAre(3, 3));
}

TEST(Calibration, DensityIsReachedAndNotMuchPassed) {
  EXPECT_THAT(steps_at_density(kCurves, 0.3), ElementsAre(2, 1)) << "0.3 in the mean";
  EXPECT_THAT(steps_at_density(kCurves, 0.01), ElementsAre(3, 3)) << "as few as there are";
  EXPECT_THAT(steps_at_density(kCurves, 1.0), ElementsAre(0, 0));
}

TEST(Calibration, NoSingleStepKeepsMoreMassAtTheSameDensity) {
  std::mt19937 random(3);
  std::uniform_real_distribution<double> uniform(0, 1);
  for (int trial = 0; trial < 50; ++trial) {
    Curves curves(6);
    for (auto& curve : curves) {
      const double need = uniform(random);
      for (double density = 1; density > 0.01; density *= 0.8) curve.push_back({density, std::pow(density, need)});
    }
    const auto mean = [&](const std::vector<std::size_t>& steps) {
      KeptShare sum;
      for (std::size_t i = 0; i < curves.size(); ++i) {
        sum.density += curves[i][steps[i]].density / 6;
        sum.mass += curves[i][steps[i]].mass / 6;
      }
      return sum;
    };
    for (std::size_t step = 1; step < curves[0].size(); ++step) {
      const KeptShare single = mean(std::vector<std::size_t>(6, step));
      EXPECT_GE(mean(steps_at_density(curves, single.density)).mass, single.mass - 1e-9) << "trial " << trial;
    }
  }
}

TEST(Calibration, MassIsKeptByEveryHead) {
  EXPECT_THAT(steps_at_mass(kCurves, 0.75), ElementsAre(2, 1));
  EXPECT_THAT(steps_at_mass(kCurves, 0.985), ElementsAre(1, 0));
}

TEST(Calibration, LaddersBeginWithEveryPageAndKeepFewer) {
  const auto thresholds = budget_ladder(BudgetKind::kThreshold);
  EXPECT_EQ(thresholds.front(), 0);
  EXPECT_TRUE(std::is_sorted(thresholds.begin(), thresholds.end()));
  for (const BudgetKind kind : {BudgetKind::kTopN, BudgetKind::kMass}) {
    EXPECT_EQ(budget_ladder(kind).front(), 1);
    EXPECT_TRUE(std::is_sorted(budget_ladder(kind).rbegin(), budget_ladder(kind).rend()));
  }
  EXPECT_THAT(parse_calibration_budget("density").status().message(), HasSubstr("allowed: threshold, top, mass"));
}

TEST(Calibration, TargetsByName) {
  EXPECT_EQ(parse_calibration_target("mass=0.95")->kind, CalibrationTarget::Kind::kMass);
  EXPECT_DOUBLE_EQ(parse_calibration_target("density=0.1")->value, 0.1);
  for (const char* text : {"", "density", "density=", "density=0", "density=1", "mass=x", "speed=0.5", "mass=0.5x"}) {
    EXPECT_THAT(parse_calibration_target(text).status().message(), HasSubstr("allowed: density=X or mass=X")) << text;
  }
}

TEST(Calibration, SurvivesItsFile) {
  Calibration made;
  made.model = "abc";
  made.selector = "sub-mean";
  made.flags = {{"vote", ""}};
  made.budget = BudgetKind::kMass;
  made.page_tokens = 64;
  made.num_layers = 2;
  made.num_heads = 3;
  for (int i = 0; i < 6; ++i)
    made.heads.push_back({budget_ladder(BudgetKind::kMass)[static_cast<std::size_t>(i)], {0.5, 0.25}});
  made.fitted = {{"prompts", 1}};
  const auto again = parse_calibration(to_json(made).dump(), "test");
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(to_json(*again), to_json(made));
  EXPECT_EQ(again->thresholds().values, made.thresholds().values) << "not a bit lost";
  EXPECT_EQ(again->thresholds().at(1, 2, -1), budget_ladder(BudgetKind::kMass)[5]);
  const nlohmann::json whole = to_json(made);
  for (const auto& [key, value] : whole.items()) {
    nlohmann::json json = whole;
    json.erase(key);
    EXPECT_FALSE(parse_calibration(json.dump(), "test").ok()) << key;
  }
}

}  // namespace
}  // namespace compact::engine
