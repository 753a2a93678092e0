/// RULER on a loaded model: every sample once per selector, in one process.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "compact/status.h"
#include "compact/thread_pool.h"
#include "engine/eval/record.h"
#include "engine/eval/ruler_task.h"
#include "engine/scheduler/answer.h"

namespace compact::engine {

struct SelectorRun {
  std::string label;        // as the user wrote it
  GenerateOptions options;  // max_tokens and end_tokens are the task's and the model's
};

/// Which samples this process answers: those whose index leaves `index` when divided by `count`.
struct Shard {
  std::int32_t index = 0;
  std::int32_t count = 1;
};

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

/// Called after every answer; `record` has just been written to the work file.
using OnRecord = std::function<void(const EvalRecord& record)>;

/// Answers what the shard has and the work file (may be null) has not, greedily, each answer up to the task's limit or
/// until nothing more can be won; every sample with one selector after the other. Returns all records of the run,
/// resumed ones included.
[[nodiscard]] Result<std::vector<EvalRecord>> evaluate_ruler(const RulerQuestions& questions, const RulerTasks& tasks,
                                                             const std::vector<SelectorRun>& selectors,
                                                             const LoadedModel& model, WorkFile* work,
                                                             const OnRecord& on_record, ThreadPool& pool);

}  // namespace compact::engine
