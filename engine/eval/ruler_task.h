/// RULER's tasks (NVIDIA/RULER, arXiv 2404.06654): prompts from a seed, in its wording and with its parameters.
///
/// What a reader of RULER's own generator should know: our draws are our own, so prompts are of the same kind, not the
/// same prompts; every sample has a seed of its own (so samples can be made anywhere, in any order); sentences of prose
/// are found by a rule, not by a trained model; cwe puts its worked example into the user's turn.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "compact/status.h"
#include "engine/eval/question_set.h"
#include "engine/eval/text_sources.h"

namespace compact::engine {

/// kAll: share of the answers that occur in the output. kPart: 1 if any of them does.
enum class ScoreRule { kAll, kPart };

struct EvalSample {
  std::string prompt;         // the user's turn
  std::string answer_prefix;  // what the answer begins with, given to the model
  std::vector<std::string> answers;
};

/// What tasks draw on. Null: not given by the user; a task that needs it then says so.
struct RulerSources {
  const Prose* prose = nullptr;
  const WordList* words = nullptr;
  const QuestionSet* qa_1 = nullptr;
  const QuestionSet* qa_2 = nullptr;
};

/// Tokens of a text, without what a chat format or a tokenizer puts around it.
using CountTokens = std::function<Result<std::int64_t>(std::string_view)>;

/// Names a sample: the same four give the same sample, whatever else is evaluated.
struct SampleSeed {
  std::uint64_t seed = 42;
  std::string_view task;
  std::int32_t length_tokens = 0;
  std::int32_t index = 0;

  /// Name of a stream of draws of this sample (seeded_stream.h).
  [[nodiscard]] std::string stream(std::string_view purpose) const;
};

class RulerTask {
 public:
  virtual ~RulerTask() = default;
  RulerTask() = default;
  RulerTask(const RulerTask&) = delete;
  RulerTask& operator=(const RulerTask&) = delete;

  [[nodiscard]] virtual std::string_view name() const noexcept = 0;
  /// Room for the answer; part of the length.
  [[nodiscard]] virtual std::int32_t generate_tokens() const noexcept = 0;
  [[nodiscard]] virtual ScoreRule score_rule() const noexcept { return ScoreRule::kAll; }

  /// The haystack's units: words of prose, lines, words of a list, documents.
  [[nodiscard]] virtual std::int64_t min_units() const noexcept = 0;
  [[nodiscard]] virtual std::int64_t max_units() const noexcept = 0;
  /// Samples that the task's material is enough for.
  [[nodiscard]] virtual std::int32_t max_samples() const noexcept { return std::numeric_limits<std::int32_t>::max(); }
  /// About what a unit takes, where the search for the largest haystack begins.
  [[nodiscard]] virtual double tokens_per_unit() const noexcept = 0;
  /// What the user can do when max_units is too few for a length.
  [[nodiscard]] virtual std::string more_units_hint() const = 0;

  /// The sample with a haystack of so many units.
  [[nodiscard]] virtual EvalSample build(const SampleSeed& seed, std::int64_t units) const = 0;
};

/// All names in RULER's order; those that need files of questions last.
[[nodiscard]] const std::vector<std::string>& ruler_task_names();
/// Those whose prompts are generated from prose and words alone.
[[nodiscard]] std::vector<std::string> generated_ruler_task_names();

/// Errors: kInvalidArgument for an unknown name (lists the known) or a source that the task needs and is not there;
/// those of `count_tokens`.
[[nodiscard]] Result<std::unique_ptr<RulerTask>> make_ruler_task(std::string_view name, std::int32_t length_tokens,
                                                                 const RulerSources& sources,
                                                                 const CountTokens& count_tokens);

struct FittedSample {
  EvalSample sample;
  std::vector<std::int32_t> tokens;  // the whole prompt, answer prefix included
  std::int64_t units = 0;
};

using EncodeSample = std::function<Result<std::vector<std::int32_t>>(const EvalSample&)>;

/// The sample with the largest haystack such that prompt and answer fit into the length.
/// Errors: kInvalidArgument if not even the smallest fits, or the task has too few units; those of `encode`.
[[nodiscard]] Result<FittedSample> fit_sample(const RulerTask& task, const SampleSeed& seed,
                                              const EncodeSample& encode);

/// RULER's string match, case ignored (ASCII letters): 0 to 1.
[[nodiscard]] double match_score(ScoreRule rule, std::string_view output, const std::vector<std::string>& answers);

}  // namespace compact::engine
