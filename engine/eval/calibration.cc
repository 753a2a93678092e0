#include "engine/eval/calibration.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "engine/eval/comparison.h"
#include "engine/eval/selector_set.h"
#include "engine/loader/json.h"
#include "engine/loader/text_file.h"

namespace compact::engine {
namespace {

using Json = nlohmann::json;
using Curves = std::vector<std::vector<KeptShare>>;  // [layers x mask heads][steps]

constexpr const char* kFormat = "compact calibration 1";

// Steps of 1.46 between scores, which are shares of a row.
constexpr std::array<float, 26> kThresholds = {
    0,       1e-4F,   1.5e-4F, 2.1e-4F, 3.1e-4F, 4.5e-4F, 6.6e-4F, 9.7e-4F, 1.4e-3F, 2.1e-3F, 3e-3F, 4.4e-3F, 6.4e-3F,
    9.4e-3F, 0.0137F, 0.02F,   0.029F,  0.043F,  0.062F,  0.091F,  0.13F,   0.19F,   0.28F,   0.42F, 0.61F,   0.9F};
constexpr std::array<float, 25> kTops = {1,     0.85F, 0.72F, 0.62F,  0.53F,  0.45F,  0.38F, 0.33F,  0.28F,
                                         0.24F, 0.2F,  0.17F, 0.145F, 0.12F,  0.105F, 0.09F, 0.075F, 0.063F,
                                         0.05F, 0.04F, 0.03F, 0.02F,  0.014F, 0.007F, 0};
constexpr std::array<float, 25> kMasses = {1,     0.9995F, 0.999F, 0.998F, 0.997F, 0.995F, 0.993F, 0.99F, 0.985F,
                                           0.98F, 0.97F,   0.96F,  0.94F,  0.92F,  0.89F,  0.85F,  0.8F,  0.73F,
                                           0.65F, 0.55F,   0.45F,  0.35F,  0.25F,  0.12F,  0};
struct Ladder {
  std::string_view name;
  BudgetKind budget;
  std::span<const float> values;
};
constexpr std::array<Ladder, 3> kLadders = {{{"threshold", BudgetKind::kThreshold, kThresholds},
                                             {"top", BudgetKind::kTopN, kTops},
                                             {"mass", BudgetKind::kMass, kMasses}}};

const Ladder& ladder_of(BudgetKind budget) {
  return *std::find_if(kLadders.begin(), kLadders.end(), [budget](const Ladder& l) { return l.budget == budget; });
}

KeptShare mean_of(const Curves& curves, const std::vector<std::size_t>& steps) {
  KeptShare mean;
  for (std::size_t i = 0; i < curves.size(); ++i) {
    mean.density += curves[i][steps[i]].density;
    mean.mass += curves[i][steps[i]].mass;
  }
  const auto count = static_cast<double>(curves.size());
  return {mean.density / count, mean.mass / count};
}

// Measures the curves at every step of a dense prefill.
class LadderMeter {
 public:
  [[nodiscard]] static Result<LadderMeter> create(const CalibrationInput& input) {
    LadderMeter meter;
    meter.forced_ = input.session.sparsity.forced;
    meter.num_layers_ = input.model.config().num_hidden_layers;
    for (const float value : budget_ladder(input.budget)) {
      SelectorOptions options = input.session.sparsity.selector;
      options.budget = {.kind = input.budget, .value = value};
      options.thresholds = {};
      CA_RETURN_IF_ERROR(meter.steps_.add(options));
    }
    return meter;
  }

  [[nodiscard]] SummaryFields summaries() const { return steps_.summaries(); }
  [[nodiscard]] std::int32_t num_heads() const noexcept { return num_heads_; }

  [[nodiscard]] Status step(const AttentionStep& step) {
    const PagedKvView kv = step.cache.layer(step.layer);
    const std::int32_t past_pages = step.chunk.num_past_pages(kv.page_tokens);
    if (past_pages == 0) return {};
    const std::span<const ChunkView> chunks(&step.chunk, 1);
    steps_.begin_step();
    double seconds = 0;  // nobody asks
    for (std::size_t i = 0; i < steps_.size(); ++i) {
      CA_RETURN_IF_ERROR(steps_.select(i, select_input(step, kv, chunks, forced_), mask_, seconds, step.pool));
      if (i == 0) CA_RETURN_IF_ERROR(begin_step(step, kv, chunks));
      add_mask(step, kv.page_tokens, past_pages, i);
    }
    return {};
  }

  [[nodiscard]] Curves curves() const {
    Curves curves = sums_;
    for (std::size_t i = 0; i < curves.size(); ++i) {
      for (KeptShare& share : curves[i]) {
        share.density /= rows_pages_[i];
        share.mass /= rows_[i];
      }
    }
    return curves;
  }

 private:
  // The masses of the rows that the mask has, once its shape is known.
  [[nodiscard]] Status begin_step(const AttentionStep& step, const PagedKvView& kv, std::span<const ChunkView> chunks) {
    if (num_heads_ == 0) {
      num_heads_ = mask_.mask_heads;
      const auto curves = static_cast<std::size_t>(num_layers_ * num_heads_);
      sums_.assign(curves, std::vector<KeptShare>(steps_.size()));
      rows_.assign(curves, 0);
      rows_pages_.assign(curves, 0);
    }
    // Rows of a mask are blocks of a power of two tokens at absolute edges: the longest tells which.
    std::int32_t block_tokens = 1;
    while (make_query_blocks(chunks, block_tokens).size() > mask_.blocks.size()) block_tokens *= 2;
    return compute_page_mass(
        {.chunks = chunks, .q = step.q, .kv = kv, .softmax_scale = step.softmax_scale, .block_tokens = block_tokens},
        mass_, step.pool);
  }

  void add_mask(const AttentionStep& step, std::int32_t page_tokens, std::int32_t past_pages, std::size_t ladder_step) {
    const std::int32_t heads_per_row = step.q.heads / mask_.mask_heads;
    const auto num_blocks = static_cast<std::int32_t>(mask_.blocks.size());
    step.pool.parallel_for(mask_.mask_heads, [&](std::int64_t item, std::int32_t) {
      const auto head = static_cast<std::int32_t>(item);
      const auto curve = static_cast<std::size_t>(step.layer * num_heads_ + head);
      for (std::int32_t i = 0; i < num_blocks; ++i) {
        const QueryBlock& block = mask_.blocks[static_cast<std::size_t>(i)];
        const ForcedRanges ranges = forced_ranges(forced_, block, page_tokens, past_pages);
        const std::uint64_t* words = mask_.row(head, i);
        std::vector<std::int32_t> kept;
        for (std::int32_t j = 0; j < past_pages; ++j) {
          if ((words[j / 64] >> (j % 64) & 1U) != 0 || ranges.contains(j)) kept.push_back(j);
        }
        for (std::int32_t h = head * heads_per_row; h < (head + 1) * heads_per_row; ++h) {
          if (mass_.nonfinite[static_cast<std::size_t>(mass_.row_index(h, i))] > 0) continue;
          const float* past = mass_.past_row(h, i);
          double mass = double{mass_.chunk_mass(h, i)};
          for (const std::int32_t j : kept) mass += double{past[j]};
          sums_[curve][ladder_step].mass += block.tokens * mass;
          sums_[curve][ladder_step].density += static_cast<double>(block.tokens) * static_cast<double>(kept.size());
          if (ladder_step > 0) continue;
          rows_[curve] += block.tokens;
          rows_pages_[curve] += static_cast<double>(block.tokens) * past_pages;
        }
      }
    });
  }

  SelectorSet steps_;  // of the ladder
  ForcedPages forced_;
  std::int32_t num_layers_ = 0;
  std::int32_t num_heads_ = 0;
  Curves sums_;                     // weighted by tokens
  std::vector<double> rows_;        // [layers x mask heads]  tokens x query heads
  std::vector<double> rows_pages_;  // [the same]  times past pages
  BlockMask mask_;
  PageMass mass_;
};

Status prefill_with_meter(const CalibrationInput& input, LadderMeter& meter, ThreadPool& pool) {
  SessionOptions dense = input.session;
  dense.sparsity = {};
  dense.sparsity.selector.name = "dense";
  for (const RecallPrompt& prompt : input.prompts) {
    CA_ASSIGN_OR_RETURN(Session session,
                        Session::create(input.model, std::ssize(prompt.tokens), 0, dense, meter.summaries()));
    CA_RETURN_IF_ERROR(session.batch().observe([&meter](const AttentionStep& step) { return meter.step(step); }));
    CA_RETURN_IF_ERROR(session.prefill(prompt.tokens, LogitsOf::kNone, {}, pool));
    if (input.on_prompt) input.on_prompt(prompt);
  }
  if (meter.num_heads() > 0) return {};
  return invalid_argument(
      fmt::format("no prompt has a page before its last chunk: nothing to choose from\n"
                  "  try: prompts of more than {} tokens, or a smaller --chunk",
                  input.session.chunk_tokens + input.session.page_tokens));
}

SparsityOptions with_steps(const CalibrationInput& input, const std::vector<std::size_t>& steps,
                           std::int32_t num_heads) {
  SparsityOptions sparsity = input.session.sparsity;
  const std::span<const float> ladder = budget_ladder(input.budget);
  sparsity.selector.budget = {.kind = input.budget};
  sparsity.selector.thresholds = {input.model.config().num_hidden_layers, num_heads, {}};
  for (const std::size_t step : steps) sparsity.selector.thresholds.values.push_back(ladder[step]);
  return sparsity;
}

// Densities before the union that are tried for a wanted one after it.
constexpr std::array<double, 6> kBeforeUnion = {1.0, 0.8, 0.65, 0.5, 0.35, 0.2};

// The steps whose lists read the target after the union.
Result<std::vector<std::size_t>> steps_for_lists(const CalibrationInput& input, const Curves& curves,
                                                 std::int32_t num_heads, ThreadPool& pool) {
  std::vector<RecallSelector> tried;
  for (const double share : kBeforeUnion) {
    const auto steps = steps_at_density(curves, share * input.target.value);
    tried.push_back({fmt::format("{}", share), with_steps(input, steps, num_heads)});
  }
  CA_ASSIGN_OR_RETURN(
      const std::vector<GroupRecall> groups,
      measure_recall(input.model, input.prompts, tried, input.session, RecallMeasure::kDensity, input.on_prompt, pool));
  std::vector<SweepPoint> points;
  for (std::size_t i = 0; i < tried.size(); ++i) {
    points.emplace_back(std::log(kBeforeUnion[i]), groups.front().selectors[i].stats().density());
  }
  const double share = std::exp(interpolate_density(points, input.target.value));
  return steps_at_density(curves, share * input.target.value);
}

}  // namespace

Result<BudgetKind> parse_calibration_budget(std::string_view name) {
  for (const Ladder& ladder : kLadders) {
    if (ladder.name == name) return ladder.budget;
  }
  return invalid_argument(fmt::format("budget is '{}'\n  allowed: threshold, top, mass", name));
}

std::span<const float> budget_ladder(BudgetKind budget) noexcept { return ladder_of(budget).values; }

std::vector<std::size_t> steps_at_price(const Curves& curves, double price) {
  std::vector<std::size_t> steps;
  for (const std::vector<KeptShare>& curve : curves) {
    std::size_t best = 0;
    for (std::size_t i = 1; i < curve.size(); ++i) {
      const auto gain = [&](std::size_t step) { return curve[step].mass - price * curve[step].density; };
      if (gain(i) >= gain(best)) best = i;
    }
    steps.push_back(best);
  }
  return steps;
}

std::vector<std::size_t> steps_at_density(const Curves& curves, double density) {
  // Density falls as the price rises; beyond a mass of 1 for a page in a million nothing is bought.
  double low = 1e-9;
  double high = 1e6;
  if (mean_of(curves, steps_at_price(curves, high)).density >= density) return steps_at_price(curves, high);
  for (int i = 0; i < 80; ++i) {
    const double middle = std::sqrt(low * high);
    (mean_of(curves, steps_at_price(curves, middle)).density >= density ? low : high) = middle;
  }
  return steps_at_price(curves, low);
}

std::vector<std::size_t> steps_at_mass(const Curves& curves, double mass) {
  std::vector<std::size_t> steps;
  for (const std::vector<KeptShare>& curve : curves) {
    std::size_t last = 0;
    for (std::size_t i = 1; i < curve.size(); ++i) {
      if (curve[i].mass >= mass) last = i;
    }
    steps.push_back(last);
  }
  return steps;
}

Result<CalibrationTarget> parse_calibration_target(std::string_view text) {
  CalibrationTarget target;
  const std::size_t equals = text.find('=');
  const std::string_view kind = text.substr(0, equals);
  const std::string_view number = equals == std::string_view::npos ? "" : text.substr(equals + 1);
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), target.value);
  const bool is_number = error == std::errc() && end == number.data() + number.size();
  if ((kind != "density" && kind != "mass") || !is_number || !(target.value > 0 && target.value < 1)) {
    return invalid_argument(
        fmt::format("--target is '{}'\n  allowed: density=X or mass=X with X above 0, below 1", text));
  }
  target.kind = kind == "mass" ? CalibrationTarget::Kind::kMass : CalibrationTarget::Kind::kDensity;
  return target;
}

HeadThresholds Calibration::thresholds() const {
  HeadThresholds table{num_layers, num_heads, {}};
  for (const HeadCalibration& head : heads) table.values.push_back(head.value);
  return table;
}

Json to_json(const Calibration& calibration) {
  Json json = {{"format", kFormat},
               {"model", calibration.model},
               {"selector", calibration.selector},
               {"flags", calibration.flags},
               {"budget", ladder_of(calibration.budget).name},
               {"page_tokens", calibration.page_tokens},
               {"fitted", calibration.fitted},
               {"layers", Json::array()}};
  const auto rounded = [](double value) { return std::round(value * 1e4) / 1e4; };
  for (std::int32_t layer = 0; layer < calibration.num_layers; ++layer) {
    Json heads = Json::array();
    for (std::int32_t head = 0; head < calibration.num_heads; ++head) {
      const HeadCalibration& of_head =
          calibration.heads[static_cast<std::size_t>(layer * calibration.num_heads + head)];
      // As short as it can be written and still be this float.
      heads.push_back({{"value", std::stod(fmt::format("{}", of_head.value))},
                       {"density", rounded(of_head.kept.density)},
                       {"mass", rounded(of_head.kept.mass)}});
    }
    json["layers"].push_back({{"heads", std::move(heads)}});
  }
  return json;
}

Result<Calibration> parse_calibration(std::string_view text, std::string_view file_name) {
  CA_ASSIGN_OR_RETURN(const Json json, parse_json_object(text, file_name));
  Calibration calibration;
  try {
    if (json.at("format") != kFormat) {
      return io_error(fmt::format("{}: format is {}\n  allowed: \"{}\"", file_name, shown(json["format"]), kFormat));
    }
    json.at("model").get_to(calibration.model);
    json.at("selector").get_to(calibration.selector);
    calibration.flags = json.at("flags").get<Json::object_t>();
    CA_ASSIGN_OR_RETURN(calibration.budget, parse_calibration_budget(json.at("budget").get_ref<const std::string&>()));
    json.at("page_tokens").get_to(calibration.page_tokens);
    calibration.fitted = json.at("fitted");
    const Json::array_t& layers = json.at("layers").get_ref<const Json::array_t&>();
    calibration.num_layers = static_cast<std::int32_t>(layers.size());
    for (const Json& layer : layers) {
      const Json::array_t& heads = layer.at("heads").get_ref<const Json::array_t&>();
      const auto count = static_cast<std::int32_t>(heads.size());
      if (count < 1 || (calibration.num_heads > 0 && calibration.num_heads != count)) {
        return io_error(
            fmt::format("{}: a layer has {} heads, another {}\n  allowed: the same number for all, 1 or more",
                        file_name, count, calibration.num_heads));
      }
      calibration.num_heads = count;
      for (const Json& head : heads) {
        const HeadCalibration of_head{head.at("value").get<float>(),
                                      {head.at("density").get<double>(), head.at("mass").get<double>()}};
        if (!(of_head.value >= 0) || of_head.value > 1) {
          return io_error(fmt::format("{}: a value is {}\n  allowed: 0 to 1", file_name, shown(head["value"])));
        }
        calibration.heads.push_back(of_head);
      }
    }
  } catch (const Json::exception& error) {
    return io_error(fmt::format("{}: not a file of compact calibrate: {}", file_name, error.what()));
  }
  if (calibration.num_layers == 0) return io_error(fmt::format("{}: no layers", file_name));
  return calibration;
}

Result<Calibration> load_calibration(const std::filesystem::path& path) {
  CA_ASSIGN_OR_RETURN(const std::string text, read_text_file(path));
  return parse_calibration(text, path.string());
}

Status check_calibration_model(const Calibration& calibration, const std::string& model, const ModelConfig& config) {
  if (calibration.model != model) {
    return invalid_argument(
        fmt::format("the calibration was fitted on checkpoint {}; this one is {}\n"
                    "  try: compact calibrate on this checkpoint",
                    calibration.model, model));
  }
  const bool heads_fit =
      calibration.num_heads == config.num_attention_heads || calibration.num_heads == config.num_key_value_heads;
  if (calibration.num_layers == config.num_hidden_layers && heads_fit) return {};
  return invalid_argument(
      fmt::format("the calibration has {} layers x {} heads\n  allowed: {} layers x {} query heads or {} KV heads",
                  calibration.num_layers, calibration.num_heads, config.num_hidden_layers, config.num_attention_heads,
                  config.num_key_value_heads));
}

Result<CalibrationFit> fit_calibration(const CalibrationInput& input, ThreadPool& pool) {
  CA_ASSIGN_OR_RETURN(LadderMeter meter, LadderMeter::create(input));
  CA_RETURN_IF_ERROR(prefill_with_meter(input, meter, pool));
  const Curves curves = meter.curves();
  std::vector<std::size_t> steps;
  if (input.target.kind == CalibrationTarget::Kind::kDensity) {
    CA_ASSIGN_OR_RETURN(steps, steps_for_lists(input, curves, meter.num_heads(), pool));
  } else {
    steps = steps_at_mass(curves, input.target.value);
  }

  CalibrationFit fit;
  fit.num_layers = input.model.config().num_hidden_layers;
  fit.num_heads = meter.num_heads();
  for (std::size_t i = 0; i < steps.size(); ++i)
    fit.heads.push_back({budget_ladder(input.budget)[steps[i]], curves[i][steps[i]]});
  fit.mean = mean_of(curves, steps);
  const std::span<const float> ladder = budget_ladder(input.budget);
  for (std::size_t step = ladder.size(); step-- > 0;) {
    const KeptShare all = mean_of(curves, std::vector<std::size_t>(curves.size(), step));
    if (step + 1 < ladder.size() && all.density > fit.mean.density) break;
    fit.single_value = ladder[step];
    fit.single = all;
  }

  const std::vector<RecallSelector> found = {{"calibrated", with_steps(input, steps, fit.num_heads)}};
  CA_ASSIGN_OR_RETURN(
      const std::vector<GroupRecall> groups,
      measure_recall(input.model, input.prompts, found, input.session, RecallMeasure::kMass, input.on_prompt, pool));
  const SelectorRecall& measured = groups.front().selectors.front();
  fit.density = measured.stats().density();
  fit.union_inflation = measured.stats().union_inflation();
  fit.recall = measured.sums().recall();
  return fit;
}

}  // namespace compact::engine
