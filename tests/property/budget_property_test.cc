// Budgets against a full sort: the histogram is an optimisation and must not show.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "src/core/bit_words.h"
#include "src/select/budget.h"
#include "tests/kv_testing.h"

namespace compact {
namespace {

using testing::Random;

struct Case {
  std::vector<std::vector<float>> scores;  // [rows][Np]
  std::vector<ForcedRanges> forced;
  std::vector<std::int64_t> weights;
  std::vector<float> elsewhere;
  std::int64_t full_weight = 0;
  float value = 0;
  Budget limits;
};

// Scores of very different sizes with many ties, zeros, and values outside the histogram's range.
Case random_case(std::uint64_t seed) {
  Random random(seed);
  Case c;
  const auto pages = static_cast<std::size_t>(random.integer(1, random.integer(0, 3) == 0 ? 300 : 40));
  const std::int32_t kind = random.integer(0, 4);
  for (std::int32_t row = random.integer(1, 5); row > 0; --row) {
    std::vector<float> scores(pages);
    for (float& score : scores) {
      switch (kind) {
        case 0: score = static_cast<float>(random.integer(0, 3)) / 4; break;  // ties
        case 1: score = std::ldexp(1.0F + static_cast<float>(random.integer(0, 7)) / 8, random.integer(-60, 20)); break;
        case 2: score = std::abs(random.real()); break;
        case 3: score = random.integer(0, 2) == 0 ? 0.0F : std::exp2(4 * random.real()); break;
        default: score = 0.25F + static_cast<float>(random.integer(0, 9)) * 1e-7F; break;  // one bin
      }
    }
    c.scores.push_back(scores);
    const auto past = static_cast<std::int32_t>(pages);
    ForcedRanges forced;
    forced.sink_end = random.integer(0, std::min(3, past));
    forced.window_begin = random.integer(0, past);
    forced.window_end = random.integer(c.scores.size() % 2 == 0 ? forced.window_begin : past, past);
    c.forced.push_back(forced);
    c.weights.push_back(random.integer(1, 512));
    c.elsewhere.push_back(random.integer(0, 1) == 0 ? 0.0F : std::abs(random.real()));
  }
  c.full_weight = random.integer(0, 1) == 0 ? 0 : random.integer(1, 5000);
  c.value = static_cast<float>(random.integer(0, 999)) / 1000.0F;
  c.limits.min_pages = random.integer(0, 2) == 0 ? random.integer(0, 10) : 0;
  c.limits.max_pages = random.integer(0, 2) == 0 ? c.limits.min_pages + random.integer(1, 10) : 0;
  return c;
}

std::vector<std::size_t> sorted(const std::vector<float>& scores) {
  std::vector<std::size_t> order(scores.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return scores[a] > scores[b]; });
  return order;
}

class BudgetProperty : public ::testing::Test {
 protected:
  // Calls check(case) for cases of every kind.
  template <class Check>
  void for_each_case(Check check) {
    for (std::uint64_t seed = 1; seed <= 400; ++seed) {
      SCOPED_TRACE("seed " + std::to_string(seed));
      check(random_case(seed));
      if (HasFatalFailure()) return;
    }
  }

  // The mask of every row after `decide`, and before: one bool a page.
  using Kept = std::vector<bool>;

  static Kept read(const std::vector<std::uint64_t>& words, std::size_t pages) {
    Kept kept(pages);
    for (std::size_t j = 0; j < pages; ++j) kept[j] = test_bit(words.data(), static_cast<std::int32_t>(j));
    for (std::size_t j = pages; j < words.size() * 64; ++j) {
      EXPECT_FALSE(test_bit(words.data(), static_cast<std::int32_t>(j))) << "a page past Np";
    }
    return kept;
  }
  static ScoreRow row_of(const Case& c, std::size_t i, std::vector<std::uint64_t>& words) {
    words.assign((c.scores[i].size() + 63) / 64, 0);
    return {c.scores[i], c.forced[i], c.elsewhere[i], c.weights[i], words.data()};
  }
  static bool forced(const Case& c, std::size_t i, std::size_t j) {
    return c.forced[i].contains(static_cast<std::int32_t>(j));
  }
  // min_pages and max_pages by sorting.
  static void limit(const Case& c, std::size_t i, bool skip_forced, Kept& kept) {
    const auto count = static_cast<std::int32_t>(std::count(kept.begin(), kept.end(), true));
    std::int32_t best = -1;
    if (count < c.limits.min_pages) best = c.limits.min_pages;
    if (c.limits.max_pages > 0 && count > c.limits.max_pages) {
      best = c.limits.max_pages;
      kept.assign(kept.size(), false);
    }
    for (const std::size_t j : sorted(c.scores[i])) {
      if (best <= 0) break;
      if (skip_forced && forced(c, i, j)) continue;
      kept[j] = true;
      --best;
    }
  }
};

TEST_F(BudgetProperty, ThresholdAndTopNEqualASort) {
  for_each_case([&](const Case& c) {
    BudgetScratch scratch;
    std::vector<std::uint64_t> words;
    for (std::size_t i = 0; i < c.scores.size(); ++i) {
      const std::size_t pages = c.scores[i].size();
      scratch.decide(BudgetKind::kThreshold, c.value, c.limits, row_of(c, i, words));
      Kept expected(pages);
      for (std::size_t j = 0; j < pages; ++j) expected[j] = c.scores[i][j] >= c.value;
      limit(c, i, false, expected);
      ASSERT_EQ(read(words, pages), expected) << "threshold " << c.value;

      scratch.decide(BudgetKind::kTopN, c.value, c.limits, row_of(c, i, words));
      expected.assign(pages, false);
      const auto order = sorted(c.scores[i]);
      // The value is a decimal of three digits: count in integers.
      const auto thousandths = static_cast<std::size_t>(std::lround(double{c.value} * 1000));
      for (std::size_t n = 0; n < (thousandths * pages + 999) / 1000; ++n) expected[order[n]] = true;
      limit(c, i, false, expected);
      ASSERT_EQ(read(words, pages), expected) << "top " << c.value;
    }
  });
}

TEST_F(BudgetProperty, MassIsAShortestPrefix) {
  for_each_case([&](const Case& c) {
    BudgetScratch scratch;
    std::vector<std::uint64_t> words;
    for (std::size_t i = 0; i < c.scores.size(); ++i) {
      const std::vector<float>& scores = c.scores[i];
      scratch.decide(BudgetKind::kMass, c.value, c.limits, row_of(c, i, words));
      // The definition: scores as 40-bit integers on the scale of the largest.
      float largest = c.elsewhere[i];
      for (const float score : scores) largest = std::max(largest, score);
      const double scale = largest > 0 ? std::ldexp(1.0, 39 - std::ilogb(largest)) : 0;
      const auto fixed = [&](float score) { return static_cast<std::uint64_t>(double{score} * scale); };
      std::uint64_t total = fixed(c.elsewhere[i]);
      for (const float score : scores) total += fixed(score);
      const auto wanted = static_cast<std::uint64_t>(std::ceil(double{c.value} * static_cast<double>(total)));
      std::uint64_t taken = fixed(c.elsewhere[i]);
      for (std::size_t j = 0; j < scores.size(); ++j) taken += forced(c, i, j) ? fixed(scores[j]) : 0;
      Kept expected(scores.size());
      for (const std::size_t j : sorted(scores)) {
        if (taken >= wanted) break;
        if (forced(c, i, j)) continue;
        expected[j] = true;
        taken += fixed(scores[j]);
      }
      limit(c, i, true, expected);
      ASSERT_EQ(read(words, scores.size()), expected) << "mass " << c.value << " row " << i;
    }
  });
}

TEST_F(BudgetProperty, DensityIsOneThresholdForAllRows) {
  for_each_case([&](const Case& c) {
    BudgetScratch scratch;
    std::vector<std::vector<std::uint64_t>> words(c.scores.size());
    std::vector<ScoreRow> rows;
    struct Entry {
      float score;
      std::size_t row, page;
    };
    std::vector<Entry> entries;
    auto total = static_cast<std::uint64_t>(c.full_weight);
    auto taken = total;
    for (std::size_t i = 0; i < c.scores.size(); ++i) {
      rows.push_back(row_of(c, i, words[i]));
      for (std::size_t j = 0; j < c.scores[i].size(); ++j) {
        total += static_cast<std::uint64_t>(c.weights[i]);
        if (forced(c, i, j)) taken += static_cast<std::uint64_t>(c.weights[i]);
        entries.push_back({c.scores[i][j], i, j});
      }
    }
    scratch.decide_density(c.value, c.limits, rows, c.full_weight);
    std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.score > b.score; });
    std::vector<Kept> expected;
    for (const auto& scores : c.scores) expected.emplace_back(scores.size());
    const auto wanted = static_cast<std::uint64_t>(std::ceil(double{c.value} * static_cast<double>(total)));
    for (const Entry& entry : entries) {
      if (taken >= wanted) break;
      if (forced(c, entry.row, entry.page)) continue;
      expected[entry.row][entry.page] = true;
      taken += static_cast<std::uint64_t>(c.weights[entry.row]);
    }
    for (std::size_t i = 0; i < c.scores.size(); ++i) {
      limit(c, i, true, expected[i]);
      ASSERT_EQ(read(words[i], c.scores[i].size()), expected[i]) << "density " << c.value << " row " << i;
    }
  });
}

}  // namespace
}  // namespace compact
