// What `compact eval` rests on: draws, intervals, scores, sentences, the search for the largest haystack.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "engine/eval/record.h"
#include "engine/eval/ruler_task.h"
#include "engine/eval/seeded_stream.h"
#include "engine/eval/statistics.h"
#include "engine/eval/text_sources.h"

namespace compact::engine {
namespace {

using testing::HasSubstr;

TEST(SeededStream, DrawsDifferentIntegersOfTheRangeByEitherWay) {
  SeededStream stream("distinct");
  for (const std::int64_t n : {1, 2, 5, 40}) {
    for (std::int64_t count = 0; count <= n; ++count) {
      std::vector<std::int64_t> drawn = stream.distinct_below(n, count);
      ASSERT_EQ(std::ssize(drawn), count);
      std::sort(drawn.begin(), drawn.end());
      EXPECT_EQ(std::adjacent_find(drawn.begin(), drawn.end()), drawn.end()) << "n " << n << " count " << count;
      if (count > 0) {
        EXPECT_GE(drawn.front(), 0);
        EXPECT_LT(drawn.back(), n);
      }
    }
  }
}

TEST(SeededStream, EveryPlaceIsDrawnAboutEquallyOften) {
  SeededStream stream("even");
  std::vector<int> hits(10);
  for (int i = 0; i < 10000; ++i) {
    for (const std::int64_t place : stream.distinct_below(10, 3)) ++hits[static_cast<std::size_t>(place)];
  }
  // 3000 expected with a standard deviation of 46.
  for (const int count : hits) EXPECT_NEAR(count, 3000, 230);
}

TEST(Statistics, ScoreIntervalWorkedByHand) {
  const std::vector<double> scores = {1, 1, 1, 1, 1, 1, 1, 1, 0, 0};
  const Interval interval = score_interval(scores);
  // Center (8 + 2) / 14; half 1.96 sqrt(10/14 * 4/14 / 14).
  EXPECT_DOUBLE_EQ(interval.mean, 0.8);
  EXPECT_NEAR(interval.low, 10.0 / 14 - 1.959964 * std::sqrt(40.0 / 196 / 14), 1e-6);
  EXPECT_NEAR(interval.high, 10.0 / 14 + 1.959964 * std::sqrt(40.0 / 196 / 14), 1e-6);
  const std::vector<double> all(20, 1.0);
  EXPECT_EQ(score_interval(all).high, 1);
  EXPECT_LT(score_interval(all).low, 0.95) << "twenty right answers do not prove that the next is right";
}

TEST(Statistics, DifferenceIntervalLeavesRoomWhenNoPairDiffers) {
  const std::vector<double> none(10, 0.0);
  const Interval interval = difference_interval(none);
  EXPECT_EQ(interval.mean, 0);
  EXPECT_NEAR(interval.high, 1.959964 / 12, 1e-6);  // sqrt(1/12 / 12)
  EXPECT_NEAR(interval.low, -1.959964 / 12, 1e-6);
  const std::vector<double> worse = {-1, -1, 0, 0, 0, 0, 0, 0};
  EXPECT_DOUBLE_EQ(difference_interval(worse).mean, -0.25);
  EXPECT_LT(difference_interval(worse).low, -0.4);
}

TEST(Statistics, MeanOfIndependentMeansAddsVariances) {
  const std::vector<Interval> two = {{0.5, 0.2, 0.9}, {0.7, 0.3, 1.0}};
  const Interval mean = mean_of(two);
  EXPECT_DOUBLE_EQ(mean.mean, 0.6);
  EXPECT_NEAR(mean.low, 0.6 - std::sqrt(0.09 + 0.16) / 2, 1e-12);
  EXPECT_NEAR(mean.high, 0.6 + std::sqrt(0.16 + 0.09) / 2, 1e-12);
}

TEST(MatchScore, ShareOfAnswersOrAnyIgnoringCase) {
  const std::vector<std::string> answers = {"Lamp", "1234567", "door"};
  EXPECT_DOUBLE_EQ(match_score(ScoreRule::kAll, "the LAMP and 1234567.", answers), 2.0 / 3);
  EXPECT_EQ(match_score(ScoreRule::kPart, "the LAMP and 1234567.", answers), 1);
  EXPECT_EQ(match_score(ScoreRule::kPart, "123456", answers), 0);
  EXPECT_EQ(match_score(ScoreRule::kAll, "anything", {}), 0);
}

std::vector<std::string> sentences(const std::string& text) {
  // Prose needs a hundred words; what fills it up begins in lower case, so it ends nothing.
  std::string filled = text;
  for (int i = 0; i < 100; ++i) filled += " and so";
  const auto prose = Prose::parse(filled, "test");
  EXPECT_TRUE(prose.ok()) << prose.status().message();
  std::vector<std::string> found(1);
  for (std::int64_t i = 0; i < prose->num_words(); ++i) {
    found.back() += (found.back().empty() ? "" : " ") + std::string(prose->word(i));
    if (prose->ends_sentence(i)) found.emplace_back();
  }
  found.pop_back();
  return found;
}

TEST(Prose, SentencesEndByTheRule) {
  EXPECT_THAT(
      sentences("Mr. Bennet left. \"Did he?\" said J. K. Jones. Yes! (It is so.) Then e.g. this... went on, etc. "
                "and I was I. The"),
      testing::ElementsAre("Mr. Bennet left.", "\"Did he?\" said J. K. Jones.", "Yes!", "(It is so.)",
                           "Then e.g. this... went on, etc. and I was I."));
}

TEST(Prose, RepeatsWithoutEnd) {
  std::string text;
  for (int i = 0; i < 100; ++i) text += "w" + std::to_string(i) + "\n\t ";
  const auto prose = Prose::parse(text, "test");
  ASSERT_TRUE(prose.ok());
  EXPECT_EQ(prose->word(100), "w0");
  EXPECT_EQ(prose->word(1234567), "w67");
}

// A haystack whose prompt takes as many tokens as `count` says.
class CountingTask final : public RulerTask {
 public:
  CountingTask(std::function<std::int64_t(std::int64_t)> count, std::int64_t max_units)
      : count_(std::move(count)), max_units_(max_units) {}
  std::string_view name() const noexcept override { return "counting"; }
  std::int32_t generate_tokens() const noexcept override { return 10; }
  std::int64_t min_units() const noexcept override { return 2; }
  std::int64_t max_units() const noexcept override { return max_units_; }
  double tokens_per_unit() const noexcept override { return 3; }
  std::string more_units_hint() const override { return "--words FILE"; }
  EvalSample build(const SampleSeed&, std::int64_t units) const override {
    return {std::string(static_cast<std::size_t>(count_(units)), 'x'), "", {}};
  }

 private:
  std::function<std::int64_t(std::int64_t)> count_;
  std::int64_t max_units_;
};

Result<FittedSample> fit(const RulerTask& task, std::int32_t length_tokens, int* encodings = nullptr) {
  return fit_sample(task, {42, task.name(), length_tokens, 0},
                    [&](const EvalSample& sample) -> Result<std::vector<std::int32_t>> {
                      if (encodings != nullptr) ++*encodings;
                      return std::vector<std::int32_t>(sample.prompt.size());
                    });
}

TEST(FitSample, FindsTheLargestThatFitsInFewTries) {
  const std::vector<std::function<std::int64_t(std::int64_t)>> counts = {
      [](std::int64_t n) { return 100 + 7 * n; },           [](std::int64_t n) { return 50 + n; },
      [](std::int64_t n) { return 20 + n + n * n / 50; },  // units grow
      [](std::int64_t n) { return 30 + 9 * (n / 20) + 1; },  // grows in steps
      [](std::int64_t n) { return n < 40 ? 12 : 40 * n; },  // a jump
  };
  for (std::size_t i = 0; i < counts.size(); ++i) {
    for (const std::int32_t length : {180, 200, 1000, 4096, 16384}) {
      const CountingTask task(counts[i], std::int64_t{1} << 28);
      int encodings = 0;
      const auto fitted = fit(task, length, &encodings);
      ASSERT_TRUE(fitted.ok()) << fitted.status().message();
      EXPECT_LE(counts[i](fitted->units), length - 10) << "count " << i << " length " << length;
      EXPECT_GT(counts[i](fitted->units + 1), length - 10) << "count " << i << " length " << length;
      EXPECT_EQ(std::ssize(fitted->tokens), counts[i](fitted->units));
      EXPECT_LE(encodings, 40) << "count " << i << " length " << length;
    }
  }
}

TEST(FitSample, NamesWhatDoesNotFit) {
  const CountingTask large([](std::int64_t n) { return 100 + n; }, 1000);
  EXPECT_THAT(fit(large, 111).status().message(), HasSubstr("allowed: 112 tokens or more"));
  EXPECT_TRUE(fit(large, 112).ok());
  const CountingTask few([](std::int64_t n) { return 100 + n; }, 50);
  EXPECT_THAT(fit(few, 1000).status().message(), HasSubstr("50 units make 150\n  try: --words FILE"));
}

TEST(EvalRecord, SurvivesJson) {
  EvalRecord record;
  record.task = "vt";
  record.length_tokens = 8192;
  record.index = 3;
  record.selector = "mean-key:share=0.1";
  record.score = 0.4;
  record.answers = {"ABCDE", "XYZ"};
  record.output = "line\nbreak \xc3\xa9";
  record.prompt_tokens = 8000;
  record.generated_tokens = 30;
  record.ttft_seconds = 1.5;
  record.attention_seconds = 0.5;
  record.decode_seconds = 0.25;
  record.stats = {10, 5, 40};
  record.dense_chunks = 2;
  record.nonfinite_rows = 1;
  const nlohmann::json json = to_json(record);
  const auto again = record_from_json(nlohmann::json::parse(json.dump()), "test");
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(to_json(*again), json);
  EXPECT_EQ(again->key(), record.key());
  for (const auto& [key, value] : json.items()) {
    nlohmann::json damaged = json;
    damaged.erase(key);
    EXPECT_THAT(record_from_json(damaged, "file, line 2").status().message(), HasSubstr(key));
  }
}

}  // namespace
}  // namespace compact::engine
