#include "engine/eval/ruler_task.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <utility>

#include "engine/eval/ruler_tasks.h"

namespace compact::engine {
namespace {

std::string lowercase(std::string_view text) {
  std::string lower(text);
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return lower;
}

}  // namespace

std::string SampleSeed::stream(std::string_view purpose) const {
  return fmt::format("{}/{}/{}/{}/{}", seed, task, length_tokens, index, purpose);
}

const std::vector<std::string>& ruler_task_names() {
  static const std::vector<std::string> kNames = {"niah_single_1",
                                                  "niah_single_2",
                                                  "niah_single_3",
                                                  "niah_multikey_1",
                                                  "niah_multikey_2",
                                                  "niah_multikey_3",
                                                  "niah_multivalue",
                                                  "niah_multiquery",
                                                  "vt",
                                                  "cwe",
                                                  "fwe",
                                                  "qa_1",
                                                  "qa_2"};
  return kNames;
}

std::vector<std::string> generated_ruler_task_names() {
  std::vector<std::string> names = ruler_task_names();
  std::erase_if(names, [](const std::string& name) { return name.starts_with("qa_"); });
  return names;
}

Status missing_source(std::string_view task, std::string_view source, std::string_view flag) {
  return invalid_argument(fmt::format("task {} needs {}\n  try: {}", task, source, flag));
}

Result<std::unique_ptr<RulerTask>> make_ruler_task(std::string_view name, std::int32_t length_tokens,
                                                   const RulerSources& sources, const CountTokens& count_tokens) {
  if (name.starts_with("niah_")) {
    CA_ASSIGN_OR_RETURN(std::unique_ptr<RulerTask> task, make_niah_task(name, sources));
    if (task != nullptr) return task;
  }
  if (name == "vt") return make_variable_tracking_task(count_tokens);
  if (name == "cwe") return make_common_words_task(length_tokens, sources);
  if (name == "fwe") return make_frequent_words_task(length_tokens);
  if (name == "qa_1" || name == "qa_2") return make_question_task(name, sources);
  return invalid_argument(
      fmt::format("there is no RULER task '{}'\n  allowed: {}", name, fmt::join(ruler_task_names(), ", ")));
}

Result<FittedSample> fit_sample(const RulerTask& task, const SampleSeed& seed, const EncodeSample& encode) {
  const std::int64_t room = seed.length_tokens - task.generate_tokens();
  FittedSample best;
  std::int64_t best_count = 0;
  std::int64_t too_many = task.max_units() + 1;  // the least number of units known not to fit
  std::int64_t too_many_count = -1;
  const auto try_units = [&](std::int64_t units) -> Status {
    EvalSample sample = task.build(seed, units);
    CA_ASSIGN_OR_RETURN(std::vector<std::int32_t> tokens, encode(sample));
    const auto count = static_cast<std::int64_t>(tokens.size());
    if (count > room) {
      too_many = units;
      too_many_count = count;
    } else {
      best = {std::move(sample), std::move(tokens), units};
      best_count = count;
    }
    return {};
  };

  CA_RETURN_IF_ERROR(try_units(task.min_units()));
  if (too_many == task.min_units()) {
    return invalid_argument(
        fmt::format("task {} does not fit into {} tokens: its smallest prompt has {} and its answer takes {}\n"
                    "  allowed: {} tokens or more",
                    task.name(), seed.length_tokens, too_many_count, task.generate_tokens(),
                    too_many_count + task.generate_tokens()));
  }
  // Token counts grow almost evenly with the haystack, so a step along the slope lands next to the goal. Halving takes
  // over when it does not, and ends the search in any case.
  double tokens_per_unit = task.tokens_per_unit();
  for (int step = 0; best.units + 1 < too_many; ++step) {
    std::int64_t guess =
        best.units + std::llround(std::floor(static_cast<double>(room - best_count) / tokens_per_unit));
    if (step >= 8) guess = best.units + (too_many - best.units) / 2;
    guess = std::clamp(guess, best.units + 1, too_many - 1);
    const std::int64_t units_before = best.units;
    const std::int64_t count_before = best_count;
    CA_RETURN_IF_ERROR(try_units(guess));
    const std::int64_t count = best.units == guess ? best_count : too_many_count;
    if (guess > units_before && count > count_before) {
      tokens_per_unit = static_cast<double>(count - count_before) / static_cast<double>(guess - units_before);
    }
  }
  if (too_many > task.max_units()) {
    return invalid_argument(fmt::format("task {} cannot fill {} tokens: {} units make {}\n  try: {}", task.name(),
                                        seed.length_tokens, best.units, best_count, task.more_units_hint()));
  }
  return best;
}

double match_score(ScoreRule rule, std::string_view output, const std::vector<std::string>& answers) {
  if (answers.empty()) return 0;
  const std::string text = lowercase(output);
  const auto found = std::count_if(answers.begin(), answers.end(), [&](const std::string& answer) {
    return text.find(lowercase(answer)) != std::string::npos;
  });
  if (rule == ScoreRule::kPart) return found > 0 ? 1 : 0;
  return static_cast<double>(found) / static_cast<double>(answers.size());
}

}  // namespace compact::engine
