// `compact eval compare`: which number a density needs, which setting is the least that is as good as dense; and what
// perplexity and LongBench rest on.
#include "engine/eval/comparison.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "engine/eval/longbench.h"
#include "engine/eval/perplexity.h"
#include "engine/report/compare_report.h"

namespace compact::engine {
namespace {

using testing::HasSubstr;

SweepSpec sweep(const std::string& text) {
  auto spec = SweepSpec::parse(text);
  EXPECT_TRUE(spec.ok()) << spec.status().message();
  return *spec;
}

TEST(SweepSpec, PutsTheNumberInItsPlace) {
  EXPECT_EQ(sweep("mean-key:budget=density={},min=2:mode=tile").at(0.123456, 128),
            "mean-key:budget=density=0.1235,min=2:mode=tile");
  EXPECT_EQ(sweep("static:window={}").at(700, 128), "static:window=640") << "whole pages";
  EXPECT_EQ(sweep("static:window={}").at(3, 128), "static:window=128") << "at least one";
  EXPECT_EQ(sweep("mean-key:calibration=dir/fit_{}.json").at(0.1, 128), "mean-key:calibration=dir/fit_0.1.json");
  EXPECT_TRUE(sweep("mean-key:calibration=dir/fit_{}.json").names_target());
  EXPECT_FALSE(sweep("mean-key:share=0.1").swept());
  EXPECT_EQ(sweep("mean-key:share=0.1").at(0.5, 128), "mean-key:share=0.1");
}

TEST(SweepSpec, RefusesWhatIsNoNumberOfAFlag) {
  for (const char* text : {"{}", "mean-key:{}", "mean-key:share={}:lift={}", "mean-key:share=0.{}", "={}"}) {
    EXPECT_THAT(SweepSpec::parse(text).status().message(), HasSubstr("allowed: name:flag={}")) << text;
  }
}

TEST(InterpolateSweep, FindsTheNumberOfADensityEitherWay) {
  // density = odds of the number: a straight line in the coordinates of the search, so one step finds it.
  const auto odds = [](double value) { return 0.2 * value / (1 - value); };
  const SweepSpec rising = sweep("mean-key:budget=density={}");
  EXPECT_NEAR(interpolate_sweep(rising, {{0.5, odds(0.5)}, {0.01, odds(0.01)}}, odds(0.2)), 0.2, 1e-9);
  const SweepSpec falling = sweep("mean-key:share={}");
  EXPECT_NEAR(interpolate_sweep(falling, {{0.5, 0.1 / odds(0.5)}, {0.01, 0.1 / odds(0.01)}}, 0.1 / odds(0.2)), 0.2,
              1e-9);
  const SweepSpec tokens = sweep("static:window={}");
  EXPECT_NEAR(interpolate_sweep(tokens, {{128, 0.1}, {2048, 0.4}}, 0.2), 512, 1e-6) << "log against log";
}

TEST(InterpolateSweep, TakesTheNearestWhereNoPointReaches) {
  const SweepSpec spec = sweep("mean-key:share={}");
  EXPECT_NEAR(interpolate_sweep(spec, {{0.1, 0.3}, {0.5, 0.2}}, 0.1), 0.5, 1e-12);
  EXPECT_NEAR(interpolate_sweep(spec, {{0.1, 0.3}, {0.5, 0.2}}, 0.9), 0.1, 1e-12);
  EXPECT_NEAR(interpolate_sweep(spec, {{0.1, 0.2}, {0.5, 0.2}}, 0.2), 0.1, 1e-12) << "a level stretch has no slope";
}

CompareSetting setting(const char* selector, double target, const char* spec) {
  CompareSetting made;
  made.length_tokens = 1000;
  made.selector = selector;
  made.target = target;
  made.spec = spec;
  made.recall = 0.9;
  return made;
}

EvalRecord record(const char* task, int index, const char* selector, double score, std::int64_t listed) {
  EvalRecord made;
  made.task = task;
  made.length_tokens = 1000;
  made.index = index;
  made.selector = selector;
  made.score = score;
  made.attention_seconds = 2;
  made.steps = 4;
  made.stats = {.listed_row_pages = listed, .wanted_row_pages = listed, .visible_row_pages = 100};
  return made;
}

TEST(CompareReport, TakesTheLeastDensityThatIsAsGoodAsDense) {
  const std::vector<CompareSetting> settings = {setting("a:x={}", 0.4, "a:x=4"), setting("a:x={}", 0.1, "a:x=1"),
                                                setting("a:x={}", 0.2, "a:x=2"), setting("b:x={}", 0.2, "b:x=2"),
                                                setting("dense", 0, "dense")};
  std::vector<EvalRecord> records;
  for (const char* task : {"one", "two"}) {
    for (int i = 0; i < 2; ++i) {
      records.push_back(record(task, i, "dense", 1, 100));
      records.push_back(record(task, i, "a:x=1", i, 10));  // 50 points below
      records.push_back(record(task, i, "a:x=2", 1, 20));
      records.push_back(record(task, i, "a:x=4", 1, 40));
      records.push_back(record(task, i, "b:x=2", 0, 20));
    }
  }
  const CompareReport report = compare_rows(settings, records, 0.01);
  ASSERT_EQ(report.rows.size(), 5U);
  EXPECT_TRUE(report.rows[0].is_dense) << "dense stands before the others";
  EXPECT_EQ(report.rows[1].setting.spec, "a:x=1");
  EXPECT_DOUBLE_EQ(report.rows[1].density(), 0.1);
  EXPECT_DOUBLE_EQ(report.rows[1].mean->step_seconds, 0.5);
  EXPECT_EQ(report.rows[1].tasks.size(), 2U);
  const std::vector<EqualAccuracy> equal = equal_accuracy(report);
  ASSERT_EQ(equal.size(), 2U);
  EXPECT_EQ(equal[0].row->setting.spec, "a:x=2");
  EXPECT_EQ(equal[1].row, nullptr) << "b is never as good";
  const CompareReport lenient = compare_rows(settings, records, 0.5);
  EXPECT_EQ(equal_accuracy(lenient)[0].row->setting.spec, "a:x=1");

  const std::string svg = compare_svg(report);
  EXPECT_THAT(svg, HasSubstr("a:x=4: density 0.400, 100"));
  EXPECT_THAT(svg, HasSubstr("ms per chunk and layer"));
  EXPECT_THAT(svg, testing::EndsWith("</svg>\n"));
}

TEST(CompareReport, ShardsRepeatSettingsButDoNotContradict) {
  std::vector<WorkLine> lines = {{to_json(setting("a:x={}", 0.1, "a:x=1")), "one, line 2"},
                                 {to_json(setting("a:x={}", 0.1, "a:x=1")), "two, line 2"}};
  auto settings = settings_of(lines);
  ASSERT_TRUE(settings.ok());
  EXPECT_EQ(settings->size(), 1U);
  lines[1].json["spec"] = "a:x=2";
  EXPECT_THAT(settings_of(lines).status().message(), HasSubstr("two, line 2: a:x={} at density 0.1"));
  lines[1].json.erase("recall");
  EXPECT_THAT(settings_of(lines).status().message(), HasSubstr("recall"));
}

TEST(Perplexity, BucketsDouble) {
  for (const auto& [position, begin] :
       std::vector<std::pair<int, int>>{{0, 0}, {99, 0}, {100, 100}, {199, 100}, {200, 200}, {399, 200}, {400, 400}}) {
    EXPECT_EQ(bucket_begin(position, 100), begin) << position;
  }
}

TEST(Perplexity, LossIsMinusTheLogOfTheSoftmax) {
  const std::vector<float> row = {1.0F, 2.0F, 3.0F, 1000.0F};
  EXPECT_NEAR(negative_log_likelihood(row.data(), 3, 1), std::log(std::exp(1) + std::exp(2) + std::exp(3)) - 2, 1e-12);
  EXPECT_NEAR(negative_log_likelihood(row.data(), 4, 0), 999, 1e-9) << "no overflow";
}

TEST(LongBench, FindsTheLetterThatTheAnswerNames) {
  for (const auto& [output, letter] : std::vector<std::pair<std::string, char>>{
           {"The correct answer is (B).", 'B'},
           {"the correct answer is **(c)**", 'C'},
           {"Think. The correct answer is about A. So the correct answer is D.", 'D'},
           {"The correct answer is: A, because", 'A'}}) {
    EXPECT_EQ(longbench_letter(output), letter) << output;
  }
  for (const char* output : {"", "(B)", "The correct answer is (E)", "The correct answer is Daniel",
                             "The correct answer is B", "The correct answer is ("}) {
    EXPECT_FALSE(longbench_letter(output).has_value()) << output;
  }
}

TEST(LongBench, LeavesOutTheMiddle) {
  std::vector<std::int32_t> tokens(10);
  std::iota(tokens.begin(), tokens.end(), 0);
  EXPECT_THAT(cut_middle(tokens, 5), testing::ElementsAre(0, 1, 7, 8, 9));
  EXPECT_EQ(cut_middle(tokens, 10), tokens);
}

}  // namespace
}  // namespace compact::engine
