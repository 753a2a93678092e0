#include "src/select/budget.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>

#include "src/core/bit_words.h"

namespace compact {
namespace {

constexpr std::int32_t kNumBins = 256;

// 8 bins an octave from 2^-24 to 2^8; what lies outside shares the first or the last bin, which costs a longer sort.
std::int32_t bin_of(float score) {
  constexpr std::int32_t kFirst = (127 - 24) * 8;
  const auto bits = std::bit_cast<std::uint32_t>(score);
  if ((bits >> 31) != 0) return 0;
  return std::clamp(static_cast<std::int32_t>(bits >> 20) - kFirst, 0, kNumBins - 1);
}

FixedPoint fixed_point(const ScoreRow& row) {
  float largest = row.elsewhere;
  for (const float score : row.scores) largest = std::max(largest, score);
  return FixedPoint(largest);
}

struct KindName {
  std::string_view text;
  BudgetKind kind;
};
constexpr KindName kKindNames[] = {{"threshold", BudgetKind::kThreshold},
                                   {"top", BudgetKind::kTopN},
                                   {"mass", BudgetKind::kMass},
                                   {"density", BudgetKind::kDensity}};

template <class T>
bool parse_number(std::string_view text, T& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

}  // namespace

Status check_budget(const char* who, const Budget& budget) {
  if (budget.min_pages < 0 || budget.max_pages < 0 || (budget.max_pages > 0 && budget.min_pages > budget.max_pages)) {
    return invalid_argument(
        fmt::format("{}: min_pages is {} and max_pages {}; allowed: 0 or more, min_pages at most max_pages", who,
                    budget.min_pages, budget.max_pages));
  }
  switch (budget.kind) {
    case BudgetKind::kNative: return {};
    case BudgetKind::kThreshold:
      if (!std::isnan(budget.value)) return {};
      return invalid_argument(fmt::format("{}: the threshold is nan", who));
    case BudgetKind::kTopN:
    case BudgetKind::kMass:
    case BudgetKind::kDensity:
      if (budget.value >= 0 && budget.value <= 1) return {};
      return invalid_argument(fmt::format("{}: a budget of {} pages is {}; allowed: 0 to 1", who,
                                          budget.kind == BudgetKind::kTopN   ? "the top"
                                          : budget.kind == BudgetKind::kMass ? "a mass of"
                                                                             : "a density of",
                                          budget.value));
  }
  return invalid_argument(fmt::format("{}: budget kind {}; allowed: 0 to 4", who, static_cast<int>(budget.kind)));
}

Result<Budget> parse_budget(std::string_view text) {
  Budget budget;
  bool ok = !text.empty();
  bool first = true;
  for (std::string_view rest = text; ok && !rest.empty();) {
    const std::size_t comma = std::min(rest.find(','), rest.size());
    const std::string_view part = rest.substr(0, comma);
    rest.remove_prefix(std::min(comma + 1, rest.size()));
    const std::size_t equals = std::min(part.find('='), part.size());
    const std::string_view name = part.substr(0, equals);
    const std::string_view value = part.substr(std::min(equals + 1, part.size()));
    if (first) {
      first = false;
      if (part == "native") continue;
      const auto* entry = std::find_if(std::begin(kKindNames), std::end(kKindNames),
                                       [&](const KindName& known) { return known.text == name; });
      ok = entry != std::end(kKindNames) && parse_number(value, budget.value);
      if (ok) budget.kind = entry->kind;
    } else if (name == "min") {
      ok = parse_number(value, budget.min_pages);
    } else {
      ok = name == "max" && parse_number(value, budget.max_pages);
    }
  }
  if (!ok) {
    return invalid_argument(
        fmt::format("budget is '{}'; allowed: native, threshold=X, top=X, mass=X, density=X, then ,min=N and ,max=N "
                    "pages if wanted",
                    text));
  }
  CA_RETURN_IF_ERROR(check_budget("budget", budget));
  return budget;
}

// Visits the pages of a shortest prefix, in the order of score (best first, ties by row and page), whose weights reach
// `target`; all pages if they do not. Not in that order: only the set matters. Weights may be 0.
template <class Weight, class Visit>
void BudgetScratch::keep_prefix(std::span<const ScoreRow> rows, std::uint64_t target, Weight weight, Visit visit) {
  if (target == 0) return;
  std::array<std::uint64_t, kNumBins> bins{};
  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (std::size_t j = 0; j < rows[i].scores.size(); ++j) {
      bins[static_cast<std::size_t>(bin_of(rows[i].scores[j]))] += weight(i, j);
    }
  }
  std::uint64_t taken = 0;
  std::int32_t last = kNumBins - 1;  // the bin in which the prefix ends
  while (last > 0 && taken + bins[static_cast<std::size_t>(last)] < target) {
    taken += bins[static_cast<std::size_t>(last--)];
  }
  boundary_.clear();
  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (std::size_t j = 0; j < rows[i].scores.size(); ++j) {
      const float score = rows[i].scores[j];
      const std::int32_t bin = bin_of(score);
      if (bin > last) visit(i, j);
      if (bin == last) boundary_.push_back({score, static_cast<std::int32_t>(i), static_cast<std::int32_t>(j)});
    }
  }
  // Pushed in order of row and page: a stable sort keeps that among equals.
  std::stable_sort(boundary_.begin(), boundary_.end(),
                   [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
  for (const Candidate& c : boundary_) {
    if (taken >= target) return;
    const auto i = static_cast<std::size_t>(c.row);
    const auto j = static_cast<std::size_t>(c.page);
    visit(i, j);
    taken += weight(i, j);
  }
}

void BudgetScratch::keep_best(const ScoreRow& row, std::int32_t pages, bool skip_forced) {
  const auto counts = [&](std::size_t j) { return !skip_forced || !row.forced.contains(static_cast<std::int32_t>(j)); };
  keep_prefix(
      {&row, 1}, static_cast<std::uint64_t>(std::max(0, pages)),
      [&](std::size_t, std::size_t j) { return counts(j) ? 1U : 0U; },
      [&](std::size_t, std::size_t j) {
        if (counts(j)) set_bit(row.words, static_cast<std::int32_t>(j));
      });
}

void BudgetScratch::limit_pages(const Budget& limits, const ScoreRow& row, bool skip_forced) {
  if (limits.min_pages == 0 && limits.max_pages == 0) return;
  const auto past_pages = static_cast<std::int32_t>(row.scores.size());
  std::int32_t kept = 0;
  for (std::int32_t word = 0; word < words_for_bits(past_pages); ++word) kept += std::popcount(row.words[word]);
  if (kept < limits.min_pages) keep_best(row, limits.min_pages, skip_forced);
  if (limits.max_pages > 0 && kept > limits.max_pages) {
    std::fill_n(row.words, words_for_bits(past_pages), 0);
    keep_best(row, limits.max_pages, skip_forced);
  }
}

void BudgetScratch::decide(BudgetKind kind, float value, const Budget& limits, const ScoreRow& all) {
  ScoreRow row = all;
  row.scores = all.scores.first(static_cast<std::size_t>(all.past_pages));
  if (kind == BudgetKind::kTopN) {
    keep_best(row, top_pages(value, row.past_pages), false);
  } else if (kind == BudgetKind::kMass) {
    const FixedPoint fixed = fixed_point(all);
    const std::uint64_t elsewhere = fixed(row.elsewhere);
    std::uint64_t total = elsewhere;
    std::uint64_t taken = elsewhere;
    for (std::int32_t j = 0; j < static_cast<std::int32_t>(all.scores.size()); ++j) {
      const std::uint64_t mass = fixed(all.scores[static_cast<std::size_t>(j)]);
      total += mass;
      if (row.forced.contains(j)) taken += mass;
    }
    const std::uint64_t wanted = share_of(value, total);
    const auto is_forced = [&](std::size_t j) { return row.forced.contains(static_cast<std::int32_t>(j)); };
    keep_prefix(
        {&all, 1}, wanted > taken ? wanted - taken : 0,
        [&](std::size_t, std::size_t j) { return is_forced(j) ? 0 : fixed(all.scores[j]); },
        [&](std::size_t, std::size_t j) {
          if (!is_forced(j) && j < row.scores.size()) set_bit(row.words, static_cast<std::int32_t>(j));
        });
  } else {
    for (std::int32_t j = 0; j < row.past_pages; ++j) {
      if (row.scores[static_cast<std::size_t>(j)] >= value) set_bit(row.words, j);
    }
  }
  limit_pages(limits, row, kind == BudgetKind::kMass);
}

void BudgetScratch::decide_density(float value, const Budget& limits, std::span<const ScoreRow> rows,
                                   std::int64_t full_weight) {
  auto total = static_cast<std::uint64_t>(full_weight);
  auto taken = static_cast<std::uint64_t>(full_weight);
  for (const ScoreRow& row : rows) {
    const auto weight = static_cast<std::uint64_t>(row.weight);
    total += weight * row.scores.size();
    for (std::int32_t j = 0; j < static_cast<std::int32_t>(row.scores.size()); ++j) {
      if (row.forced.contains(j)) taken += weight;
    }
  }
  const std::uint64_t wanted = share_of(value, total);
  const auto is_forced = [&](std::size_t i, std::size_t j) {
    return rows[i].forced.contains(static_cast<std::int32_t>(j));
  };
  keep_prefix(
      rows, wanted > taken ? wanted - taken : 0,
      [&](std::size_t i, std::size_t j) {
        return is_forced(i, j) ? std::uint64_t{0} : static_cast<std::uint64_t>(rows[i].weight);
      },
      [&](std::size_t i, std::size_t j) {
        if (!is_forced(i, j)) set_bit(rows[i].words, static_cast<std::int32_t>(j));
      });
  for (const ScoreRow& row : rows) limit_pages(limits, row, true);
}

}  // namespace compact
