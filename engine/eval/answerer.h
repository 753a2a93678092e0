/// Asks several selectors the same questions, each once, and keeps what they answer.
#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compact/status.h"
#include "compact/thread_pool.h"
#include "engine/eval/record.h"
#include "engine/scheduler/answer.h"

namespace compact::engine {

struct SelectorRun {
  std::string label;        // as the user wrote it
  GenerateOptions options;  // max_tokens and end_tokens are the question's and the model's
};

/// Which samples this process works on: those whose index leaves `index` when divided by `count`.
struct Shard {
  std::int32_t index = 0;
  std::int32_t count = 1;
};

/// A question with all that it takes to ask and to judge.
struct EvalQuestion {
  std::vector<std::int32_t> tokens;  // the whole prompt
  double encode_seconds = 0;         // part of the time to first token
  std::int32_t generate_tokens = 0;
  std::vector<std::string> answers;                    // for the record
  std::function<double(std::string_view)> score;       // 0 to 1, of the output so far
  std::function<bool(std::string_view)> is_certain{};  // more output cannot change the score; not set: at a score of 1
};

/// What names a question.
struct QuestionName {
  std::string task;
  std::int32_t length_tokens = 0;
  std::int32_t index = 0;
};

class Answerer {
 public:
  /// Called after every answer; `record` has just been written to the work file.
  using OnRecord = std::function<void(const EvalRecord& record)>;
  using MakeQuestion = std::function<Result<EvalQuestion>()>;

  /// work: may be null. Errors: those of answers_of.
  [[nodiscard]] static Result<Answerer> create(const LoadedModel& model, WorkFile* work, ThreadPool& pool);
  void observe(OnRecord on_record) { on_record_ = std::move(on_record); }

  [[nodiscard]] bool has(const QuestionName& name, const std::string& selector) const {
    return done_.contains({name.task, name.length_tokens, name.index, selector});
  }
  /// One selector after the other, those aside whose answer is there; `make` is called if any is left.
  [[nodiscard]] Status ask(const QuestionName& name, const std::vector<SelectorRun>& selectors,
                           const MakeQuestion& make);

  /// Of this run and of those before it.
  [[nodiscard]] const std::vector<EvalRecord>& records() const noexcept { return records_; }

 private:
  Answerer(const LoadedModel& model, WorkFile* work, ThreadPool& pool) : model_(&model), work_(work), pool_(&pool) {}
  [[nodiscard]] Result<EvalRecord> answer(const EvalQuestion& question, const SelectorRun& selector) const;

  const LoadedModel* model_;
  WorkFile* work_;
  OnRecord on_record_;
  ThreadPool* pool_;
  std::vector<EvalRecord> records_;
  std::set<EvalRecord::Key> done_;
};

/// Bytes per token that a cache with these summaries keeps beside K and V, all layers.
[[nodiscard]] double state_bytes_per_token(const ModelConfig& config, DType kv_dtype, std::int64_t kv_bytes,
                                           std::int64_t summary_bytes) noexcept;

}  // namespace compact::engine
