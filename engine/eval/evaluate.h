/// RULER on a loaded model: every sample once per selector, in one process.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "compact/status.h"
#include "engine/eval/answerer.h"
#include "engine/eval/recall.h"
#include "engine/eval/ruler_task.h"
#include "engine/scheduler/answer.h"

namespace compact::engine {

/// What is asked.
struct RulerQuestions {
  std::vector<std::string> tasks;
  std::vector<std::int32_t> lengths_tokens;
  std::int32_t samples = 100;  // of each task and length, over all shards
  std::uint64_t seed = 42;
  Shard shard;
};

/// The prompt in the model's chat format, the answer prefix behind the assistant's header.
[[nodiscard]] Result<std::vector<std::int32_t>> encode_sample(const LoadedModel& model, const EvalSample& sample);

/// [length][task]
using RulerTasks = std::vector<std::vector<std::unique_ptr<RulerTask>>>;

/// The tasks, made for each length.
/// Errors: those of make_ruler_task; kInvalidArgument for an empty list, a task or length named twice, a length above
/// the model's positions, no samples or more than a task has, a shard outside its count.
[[nodiscard]] Result<RulerTasks> make_ruler_tasks(const RulerQuestions& questions, const RulerSources& sources,
                                                  const LoadedModel& model);

/// Every sample of the shard: by length, then task, then number. Ends with the first error of `body`.
using OnSample = std::function<Status(const RulerTask& task, const SampleSeed& seed)>;
[[nodiscard]] Status for_each_sample(const RulerQuestions& questions, const RulerTasks& tasks, const OnSample& body);

/// The samples as prompts to measure recall on, each group a task and length.
/// Errors: those of fit_sample.
[[nodiscard]] Result<std::vector<RecallPrompt>> recall_prompts(const RulerQuestions& questions, const RulerTasks& tasks,
                                                               const LoadedModel& model);

/// Asks every sample of the shard that has not been answered yet, greedily, each answer up to the task's limit or until
/// nothing more can be won.
[[nodiscard]] Status evaluate_ruler(const RulerQuestions& questions, const RulerTasks& tasks,
                                    const std::vector<SelectorRun>& selectors, const LoadedModel& model,
                                    Answerer& answerer);

}  // namespace compact::engine
