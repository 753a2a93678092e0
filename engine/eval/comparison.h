/// Selectors on equal terms: a number in each selector's spec is fitted until its lists read a wanted density.
///
/// Density here is that after the union (docs/design/method.md 1.3), measured on prompts of their own, not on those
/// that are answered. So every selector is held to what it reads, whatever its rule, its heads or its union make of a
/// threshold.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compact/status.h"
#include "compact/thread_pool.h"
#include "engine/eval/recall.h"
#include "engine/eval/work_file.h"

namespace compact::engine {

/// A selector's spec; `{}` in it stands for the number that decides how many pages are read, e.g.
/// "mean-key:budget=density={}" or "static:window={}". In the name of a calibration it stands for the wanted density
/// itself, and nothing is fitted: "mean-key:calibration=fit_{}.json". Without `{}` the selector is taken as it is.
class SweepSpec {
 public:
  /// Errors: kInvalidArgument for more than one `{}`, or one that is no flag's value.
  [[nodiscard]] static Result<SweepSpec> parse(std::string_view text);

  [[nodiscard]] const std::string& text() const noexcept { return text_; }
  [[nodiscard]] bool swept() const noexcept { return place_ != std::string::npos; }
  /// Whether the number is the wanted density itself.
  [[nodiscard]] bool names_target() const noexcept { return kind_ == Kind::kTarget; }
  /// The spec with a number in its place: tokens in whole pages, everything else with four digits.
  [[nodiscard]] std::string at(double value, std::int32_t page_tokens) const;
  /// Where a search begins: from few pages to nearly all (or the other way round, as the number means).
  [[nodiscard]] std::vector<double> first_values(std::int32_t page_tokens, std::int32_t length_tokens) const;
  /// Whether the number counts tokens; else it lies between 0 and 1.
  [[nodiscard]] bool counts_tokens() const noexcept { return kind_ == Kind::kTokens; }

 private:
  enum class Kind { kFraction, kTokens, kTarget };
  std::string text_;
  std::size_t place_ = std::string::npos;  // of the `{}`
  Kind kind_ = Kind::kFraction;
};

/// A number that was tried, and the density that came out.
using SweepPoint = std::pair<double, double>;

/// The x at which straight lines of log density between neighbours say `target`; outside the points' densities the x of
/// the nearest. Precondition: at least one point.
[[nodiscard]] double interpolate_density(std::vector<SweepPoint> points, double target);

/// The same over numbers of a sweep: over their logit, or their logarithm if they count tokens.
[[nodiscard]] double interpolate_sweep(const SweepSpec& spec, std::vector<SweepPoint> points, double target);

/// A selector as it is compared at one length, and what it does on the fitting prompts.
struct CompareSetting {
  std::int32_t length_tokens = 0;
  std::string selector;  // as given, with `{}`
  double target = 0;     // the wanted density; 0: taken as it is
  std::string spec;      // with its number
  std::int32_t prompts = 0;
  double density = 0;
  double union_inflation = 0;
  double recall = 0;
  double recall_p5 = 0;
  double oracle_recall = 0;
  double vs_oracle = 0;
};

[[nodiscard]] nlohmann::json to_json(const CompareSetting& setting);
/// The settings among the lines of work files; shards repeat them.
/// Errors: kIoError for a key that is missing or of another type; kInvalidArgument for two that contradict each other.
[[nodiscard]] Result<std::vector<CompareSetting>> settings_of(const std::vector<WorkLine>& lines);

/// From a spec to what it stands for. Errors end the fit.
using MakeSparsity = std::function<Result<SparsityOptions>(const std::string& spec)>;

struct FitInput {
  const Model& model;
  const std::vector<RecallPrompt>& prompts;  // all of one group
  std::int32_t length_tokens = 0;
  SessionOptions session;  // chunks, pages and cache of every selector
  std::vector<double> targets;
  MakeSparsity make;
  OnRecallPrompt on_prompt;  // after every prompt of each of the kFitPasses
};

/// Prefills of every fitting prompt: a coarse search, refinements, and the recall of what was found.
inline constexpr std::int32_t kFitPasses = 4;

/// The settings of the selectors at one length, one for each target, in order. Same input, same settings.
/// Errors: those of `make` and of measure_recall.
[[nodiscard]] Result<std::vector<CompareSetting>> fit_settings(const FitInput& input,
                                                               const std::vector<SweepSpec>& selectors,
                                                               ThreadPool& pool);

}  // namespace compact::engine
