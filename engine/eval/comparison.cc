#include "engine/eval/comparison.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <tuple>

namespace compact::engine {
namespace {

using Json = nlohmann::json;

constexpr std::string_view kPlace = "{}";
// Flags whose number counts tokens.
constexpr std::array<std::string_view, 3> kTokenFlags = {"window", "sink", "kept-tokens"};
// Thresholds and shares are small where few pages are wanted, masses large: both ends are tried.
constexpr std::array<double, 8> kFractions = {3e-4, 3e-3, 0.02, 0.07, 0.2, 0.5, 0.85, 0.99};
constexpr std::int32_t kRefinements = kFitPasses - 2;

double coordinate(const SweepSpec& spec, double value) {
  if (spec.counts_tokens()) return std::log(std::max(value, 1.0));
  const double inside = std::clamp(value, 1e-9, 1 - 1e-9);
  return std::log(inside / (1 - inside));
}

double value_at(const SweepSpec& spec, double coordinate) {
  return spec.counts_tokens() ? std::exp(coordinate) : 1 / (1 + std::exp(-coordinate));
}

// What is tried of one selector.
struct Search {
  const SweepSpec* spec;
  std::vector<SweepPoint> points;
  std::vector<double> found;  // [targets]
};

// Measures the specs named, each once.
class SpecMeter {
 public:
  SpecMeter(const FitInput& input, RecallMeasure measure) : input_(&input), measure_(measure) {}

  [[nodiscard]] Status add(const std::string& spec) {
    if (at_.contains(spec)) return {};
    at_.emplace(spec, selectors_.size());
    CA_ASSIGN_OR_RETURN(SparsityOptions options, input_->make(spec));
    selectors_.push_back({spec, std::move(options)});
    return {};
  }
  [[nodiscard]] Status run(ThreadPool& pool) {
    if (selectors_.empty()) return {};
    CA_ASSIGN_OR_RETURN(groups_, measure_recall(input_->model, input_->prompts, selectors_, input_->session, measure_,
                                                input_->on_prompt, pool));
    return {};
  }
  [[nodiscard]] const SelectorRecall& of(const std::string& spec) const {
    return groups_.front().selectors[at_.at(spec)];
  }

 private:
  const FitInput* input_;
  RecallMeasure measure_;
  std::map<std::string, std::size_t> at_;
  std::vector<RecallSelector> selectors_;
  std::vector<GroupRecall> groups_;
};

CompareSetting make_setting(const FitInput& input, const SweepSpec& selector, double target, std::string spec,
                            const SpecMeter& meter) {
  const SelectorRecall& found = meter.of(spec);
  const RecallSums sums = found.sums();
  const UnionStats stats = found.stats();
  return {.length_tokens = input.length_tokens,
          .selector = selector.text(),
          .target = target,
          .spec = std::move(spec),
          .prompts = static_cast<std::int32_t>(input.prompts.size()),
          .density = stats.density(),
          .union_inflation = stats.union_inflation(),
          .recall = sums.recall(),
          .recall_p5 = found.spread.percentile5(),
          .oracle_recall = sums.oracle_recall(),
          .vs_oracle = sums.vs_oracle()};
}

}  // namespace

Result<SweepSpec> SweepSpec::parse(std::string_view text) {
  SweepSpec spec;
  spec.text_ = text;
  spec.place_ = text.find(kPlace);
  if (!spec.swept()) return spec;
  const std::size_t flag = text.rfind(':', spec.place_);
  const std::string_view name =
      flag == std::string_view::npos ? "" : text.substr(flag + 1, text.find('=', flag) - flag - 1);
  const bool is_value = !name.empty() && (text[spec.place_ - 1] == '=' || name == "calibration");
  if (!is_value || text.find(kPlace, spec.place_ + 1) != std::string_view::npos) {
    return invalid_argument(
        fmt::format("selector '{}': {{}} stands for the one number that is fitted\n"
                    "  allowed: name:flag={{}} or name:budget=kind={{}}, e.g. mean-key:budget=density={{}}",
                    text));
  }
  if (name == "calibration") spec.kind_ = Kind::kTarget;
  if (std::find(kTokenFlags.begin(), kTokenFlags.end(), name) != kTokenFlags.end()) spec.kind_ = Kind::kTokens;
  return spec;
}

std::string SweepSpec::at(double value, std::int32_t page_tokens) const {
  if (!swept()) return text_;
  const std::string number = counts_tokens()
                                 ? fmt::format("{}", std::max(1LL, std::llround(value / page_tokens)) * page_tokens)
                                 : fmt::format("{:.4g}", value);
  return text_.substr(0, place_) + number + text_.substr(place_ + kPlace.size());
}

std::vector<double> SweepSpec::first_values(std::int32_t page_tokens, std::int32_t length_tokens) const {
  if (!counts_tokens()) return {kFractions.begin(), kFractions.end()};
  std::vector<double> values;
  for (double tokens = page_tokens; tokens < length_tokens; tokens *= 2) values.push_back(tokens);
  values.push_back(length_tokens);
  return values;
}

double interpolate_density(std::vector<SweepPoint> points, double target) {
  std::sort(points.begin(), points.end());
  const auto height = [target](const SweepPoint& point) { return std::log(std::max(point.second, 1e-12) / target); };
  for (std::size_t i = 1; i < points.size(); ++i) {
    const double low = height(points[i - 1]);
    const double high = height(points[i]);
    if (low * high > 0 || low == high) continue;
    return points[i - 1].first + (points[i].first - points[i - 1].first) * low / (low - high);
  }
  return std::min_element(
             points.begin(), points.end(),
             [&](const SweepPoint& a, const SweepPoint& b) { return std::abs(height(a)) < std::abs(height(b)); })
      ->first;
}

double interpolate_sweep(const SweepSpec& spec, std::vector<SweepPoint> points, double target) {
  for (SweepPoint& point : points) point.first = coordinate(spec, point.first);
  return value_at(spec, interpolate_density(std::move(points), target));
}

Json to_json(const CompareSetting& setting) {
  return {{"kind", "setting"},
          {"tokens", setting.length_tokens},
          {"selector", setting.selector},
          {"target", setting.target},
          {"spec", setting.spec},
          {"prompts", setting.prompts},
          {"density", setting.density},
          {"union_inflation", setting.union_inflation},
          {"recall", setting.recall},
          {"recall_p5", setting.recall_p5},
          {"oracle_recall", setting.oracle_recall},
          {"vs_oracle", setting.vs_oracle}};
}

Result<std::vector<CompareSetting>> settings_of(const std::vector<WorkLine>& lines) {
  std::vector<CompareSetting> settings;
  std::map<std::tuple<std::int32_t, std::string, double>, Json> seen;
  for (const WorkLine& line : lines) {
    if (!line.is("setting")) continue;
    CompareSetting setting;
    try {
      line.json.at("tokens").get_to(setting.length_tokens);
      line.json.at("selector").get_to(setting.selector);
      line.json.at("target").get_to(setting.target);
      line.json.at("spec").get_to(setting.spec);
      line.json.at("prompts").get_to(setting.prompts);
      line.json.at("density").get_to(setting.density);
      line.json.at("union_inflation").get_to(setting.union_inflation);
      line.json.at("recall").get_to(setting.recall);
      line.json.at("recall_p5").get_to(setting.recall_p5);
      line.json.at("oracle_recall").get_to(setting.oracle_recall);
      line.json.at("vs_oracle").get_to(setting.vs_oracle);
    } catch (const Json::exception& error) {
      return io_error(fmt::format("{}: not a setting of compact eval compare: {}", line.where, error.what()));
    }
    const auto [at, is_new] = seen.try_emplace({setting.length_tokens, setting.selector, setting.target}, line.json);
    if (is_new) {
      settings.push_back(std::move(setting));
    } else if (at->second["spec"] != setting.spec) {
      return invalid_argument(
          fmt::format("{}: {} at density {} and {} tokens is {} here, {} before\n"
                      "  allowed: shards of one fit",
                      line.where, setting.selector, setting.target, setting.length_tokens, setting.spec,
                      at->second["spec"].get<std::string>()));
    }
  }
  return settings;
}

Result<std::vector<CompareSetting>> fit_settings(const FitInput& input, const std::vector<SweepSpec>& selectors,
                                                 ThreadPool& pool) {
  const std::int32_t page_tokens = input.session.page_tokens;
  std::vector<Search> searches;
  for (const SweepSpec& selector : selectors) {
    if (!selector.swept()) continue;
    searches.push_back({&selector, {}, std::vector<double>(input.targets.size())});
    if (selector.names_target()) searches.back().found = input.targets;
  }
  for (std::int32_t round = 0; round <= kRefinements; ++round) {
    SpecMeter meter(input, RecallMeasure::kDensity);
    const auto values_of = [&](const Search& search) -> std::vector<double> {
      if (search.spec->names_target()) return {};
      return round == 0 ? search.spec->first_values(page_tokens, input.length_tokens) : search.found;
    };
    for (const Search& search : searches) {
      for (const double value : values_of(search)) {
        CA_RETURN_IF_ERROR(meter.add(search.spec->at(value, page_tokens)));
      }
    }
    CA_RETURN_IF_ERROR(meter.run(pool));
    for (Search& search : searches) {
      if (search.spec->names_target()) continue;
      for (const double value : values_of(search)) {
        search.points.emplace_back(value, meter.of(search.spec->at(value, page_tokens)).stats().density());
      }
      for (std::size_t i = 0; i < input.targets.size(); ++i) {
        search.found[i] = interpolate_sweep(*search.spec, search.points, input.targets[i]);
      }
    }
  }

  SpecMeter meter(input, RecallMeasure::kMass);
  for (const SweepSpec& selector : selectors) {
    if (!selector.swept()) CA_RETURN_IF_ERROR(meter.add(selector.text()));
  }
  for (const Search& search : searches) {
    for (const double value : search.found) CA_RETURN_IF_ERROR(meter.add(search.spec->at(value, page_tokens)));
  }
  CA_RETURN_IF_ERROR(meter.run(pool));
  std::vector<CompareSetting> settings;
  auto search = searches.cbegin();
  for (const SweepSpec& selector : selectors) {
    if (!selector.swept()) {
      settings.push_back(make_setting(input, selector, 0, selector.text(), meter));
      continue;
    }
    for (std::size_t i = 0; i < input.targets.size(); ++i) {
      settings.push_back(
          make_setting(input, selector, input.targets[i], selector.at(search->found[i], page_tokens), meter));
    }
    ++search;
  }
  return settings;
}

}  // namespace compact::engine
