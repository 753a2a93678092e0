/// Budgets per layer and head, fitted on the user's prompts: the file that keeps them, and the fit.
///
/// One setting for all starves some heads and wastes pages on others. The fit measures, for every (layer, mask head),
/// which share of the past and of the exact attention mass a budget keeps, over a ladder of values. Then
///   target density  every head takes the step of the ladder with the largest  mass - price * density;  one price for
///                   all, such that the lists after the union read the wanted share of the past
///   target mass     every head takes the last step that keeps the wanted mass
/// Lists, unions and masses are those of a dense prefill, as in recall (recall.h).
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "compact/selector.h"
#include "compact/status.h"
#include "compact/thread_pool.h"
#include "engine/eval/recall.h"
#include "engine/loader/model_config.h"

namespace compact::engine {

/// What a budget keeps, shares of 0 to 1, mean over rows; pages read anyway are in both.
struct KeptShare {
  double density = 0;  // of past pages, before the union
  double mass = 0;     // of the exact attention
};

struct HeadCalibration {
  float value = 0;  // of the budget
  KeptShare kept;   // on the fitting prompts
};

struct CalibrationTarget {
  enum class Kind : std::int32_t { kDensity = 0, kMass = 1 };
  Kind kind = Kind::kDensity;
  double value = 0.1;
};
/// "density=0.1", "mass=0.95". Errors: kInvalidArgument.
[[nodiscard]] Result<CalibrationTarget> parse_calibration_target(std::string_view text);

struct Calibration {
  std::string model;     // digest of the checkpoint
  std::string selector;  // whose scores the budgets are for
  nlohmann::json flags;  // what else shapes the scores: flag -> value
  BudgetKind budget = BudgetKind::kThreshold;
  std::int32_t page_tokens = 0;
  std::int32_t num_layers = 0;
  std::int32_t num_heads = 0;          // mask heads: Hq, or Hkv where the heads of a KV head share rows
  std::vector<HeadCalibration> heads;  // [num_layers, num_heads]
  nlohmann::json fitted;               // prompts, tokens, target, and what came out: for people

  /// For SelectorOptions.
  [[nodiscard]] HeadThresholds thresholds() const;
};

[[nodiscard]] nlohmann::json to_json(const Calibration& calibration);
/// Errors: kIoError naming the file and the key that is missing, of another type or out of range.
[[nodiscard]] Result<Calibration> parse_calibration(std::string_view json, std::string_view file_name);
[[nodiscard]] Result<Calibration> load_calibration(const std::filesystem::path& path);

/// Whether a calibration is for this checkpoint. Errors: kInvalidArgument naming what differs.
[[nodiscard]] Status check_calibration_model(const Calibration& calibration, const std::string& model,
                                             const ModelConfig& config);

/// "threshold", "top" or "mass". Errors: kInvalidArgument.
[[nodiscard]] Result<BudgetKind> parse_calibration_budget(std::string_view name);

/// Values of a budget that keep fewer and fewer pages, all of them first. Precondition: a kind that has a name above.
[[nodiscard]] std::span<const float> budget_ladder(BudgetKind budget) noexcept;

/// The step that every head takes when a share of the past costs `price`: curves are [heads][steps of the ladder], ties
/// to the later step.
[[nodiscard]] std::vector<std::size_t> steps_at_price(const std::vector<std::vector<KeptShare>>& curves, double price);
/// At the highest price that leaves the mean density at or above `density`; the first step for all if none does.
[[nodiscard]] std::vector<std::size_t> steps_at_density(const std::vector<std::vector<KeptShare>>& curves,
                                                        double density);
/// The last step of every head that keeps `mass`.
[[nodiscard]] std::vector<std::size_t> steps_at_mass(const std::vector<std::vector<KeptShare>>& curves, double mass);

struct CalibrationInput {
  const Model& model;
  const std::vector<RecallPrompt>& prompts;  // all of one group
  SessionOptions session;  // chunks, pages, forced pages, union, and the selector, its budget and thresholds aside
  BudgetKind budget = BudgetKind::kThreshold;
  CalibrationTarget target;
  OnRecallPrompt on_prompt;  // after every prompt of each of the kCalibrationPasses
};

/// Prefills of every prompt: the ladder, densities after the union, and the recall of what was found.
inline constexpr std::int32_t kCalibrationPasses = 3;

struct CalibrationFit {
  std::int32_t num_layers = 0;
  std::int32_t num_heads = 0;
  std::vector<HeadCalibration> heads;  // [num_layers, num_heads]
  double density = 0;                  // after the union
  double union_inflation = 0;
  double recall = 0;
  /// The value for all heads that keeps most and no more than the fit before the union, from the same ladder.
  float single_value = 0;
  KeptShare single;
  KeptShare mean;  // of the heads' own values, before the union
};

/// Errors: kInvalidArgument if no prompt is longer than a chunk, or the selector has no scores; those of Session and of
/// the selector.
[[nodiscard]] Result<CalibrationFit> fit_calibration(const CalibrationInput& input, ThreadPool& pool);

}  // namespace compact::engine
