// The registry: a new selector is one line in kSelectors.
#include "src/select/selector.h"

#include <fmt/format.h>

#include <cmath>

#include "src/select/budget.h"

namespace compact {
namespace {

struct Entry {
  std::string_view name;
  Result<std::unique_ptr<Selector>> (*make)(const SelectorOptions& options);
};

constexpr Entry kSelectors[] = {
    {"dense", [](const SelectorOptions&) -> Result<std::unique_ptr<Selector>> { return make_dense_selector(); }},
    {"static", [](const SelectorOptions&) -> Result<std::unique_ptr<Selector>> { return make_static_selector(); }},
    {"oracle", make_oracle_selector},
    {"mean-key", make_mean_key_selector},
    {"sub-mean", make_sub_mean_selector},
    {"xattention", make_xattention_selector},
    {"quoka", make_quoka_selector},
    {"seer", make_seer_selector},
    {"random", make_random_selector},
    {"external", make_external_selector},
};

struct Preset {
  std::string_view name;
  MeanKeyOptions options;
};

// Rules as published, without their dense tails. alpha depends on model and length (docs/design/method.md 3.5): these
// are the values given for Llama-3.1-8B.
constexpr Preset kMeanKeyPresets[] = {
    {"mean-key", MeanKeyOptions{}},
    // CompactAttention, arXiv 2605.16839: the v1 score before a union over the chunk.
    {"compact", {TileShape::kPerHead, PageVisibility::kLast, ScoreNorm::kTile, RowVote::kMean, 0.0F, 0.0F, 0.06F}},
    // FlashPrefill, arXiv 2603.06199.
    {"flashprefill-v1",
     {TileShape::kPerHead, PageVisibility::kLast, ScoreNorm::kTile, RowVote::kMean, 0.0F, 0.0F, 0.18F}},
    // FlashPrefill v2, arXiv 2608.19758.
    {"flashprefill-v2",
     {TileShape::kPacked, PageVisibility::kFirst, ScoreNorm::kTile, RowVote::kMean, 0.0F, 0.0F, 0.1F}},
};

// What every selector with scores accepts.
Status check_common_options(const SelectorOptions& options) {
  CA_RETURN_IF_ERROR(check_budget(options.name.c_str(), options.budget));
  const HeadThresholds& table = options.thresholds;
  const std::int64_t expected = std::int64_t{table.num_layers} * table.num_heads;
  if (table.num_layers < 0 || table.num_heads < 0 || static_cast<std::int64_t>(table.values.size()) != expected) {
    return invalid_argument(fmt::format("{}: {} thresholds for {} layers x {} heads", options.name, table.values.size(),
                                        table.num_layers, table.num_heads));
  }
  for (const float value : table.values) {
    if (std::isnan(value)) return invalid_argument(fmt::format("{}: a threshold is nan", options.name));
  }
  if (!table.empty() && options.budget.kind == BudgetKind::kDensity) {
    return invalid_argument(fmt::format(
        "{}: a density is shared by all heads of a layer; thresholds per head contradict it", options.name));
  }
  const bool default_rule = options.budget.kind == BudgetKind::kNative && options.budget.min_pages == 0 &&
                            options.budget.max_pages == 0 && table.empty();
  const bool scoreless = options.name == "dense" || options.name == "static" || options.name == "external";
  if (scoreless && !default_rule) {
    return invalid_argument(fmt::format("{}: has no scores; allowed: no budget and no thresholds", options.name));
  }
  return {};
}

template <class Entries>
std::string names_of(const Entries& entries) {
  std::string names;
  for (const auto& entry : entries) {
    if (!names.empty()) names += ", ";
    names += entry.name;
  }
  return names;
}

}  // namespace

std::string selector_names() { return names_of(kSelectors); }

Result<std::unique_ptr<Selector>> make_selector(const SelectorOptions& options) {
  CA_RETURN_IF_ERROR(check_common_options(options));
  for (const Entry& entry : kSelectors) {
    if (entry.name == options.name) return entry.make(options);
  }
  return invalid_argument(fmt::format("unknown selector '{}'; known: {}", options.name, selector_names()));
}

Result<MeanKeyOptions> mean_key_preset(std::string_view name) {
  for (const Preset& preset : kMeanKeyPresets) {
    if (preset.name == name) return preset.options;
  }
  return invalid_argument(fmt::format("unknown mean-key preset '{}'; known: {}", name, names_of(kMeanKeyPresets)));
}

}  // namespace compact
