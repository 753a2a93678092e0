#include "engine/eval/evaluate.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <set>
#include <utility>

#include "engine/model/stopwatch.h"
#include "engine/report/run_report.h"
#include "engine/text/utf8.h"

namespace compact::engine {
namespace {

template <class T>
Status refuse_twice(const std::vector<T>& values, const char* what) {
  std::set<T> seen;
  for (const T& value : values) {
    if (!seen.insert(value).second) {
      return invalid_argument(fmt::format("{} {} is named twice\n  allowed: each once", what, value));
    }
  }
  return {};
}

Status check_questions(const RulerQuestions& questions, const ModelConfig& config) {
  if (questions.tasks.empty() || questions.lengths_tokens.empty()) {
    return invalid_argument("nothing to ask\n  allowed: at least one task and one length");
  }
  CA_RETURN_IF_ERROR(refuse_twice(questions.tasks, "task"));
  CA_RETURN_IF_ERROR(refuse_twice(questions.lengths_tokens, "length"));
  if (questions.samples < 1) {
    return invalid_argument(fmt::format("{} samples of each task\n  allowed: 1 or more", questions.samples));
  }
  const Shard& shard = questions.shard;
  if (shard.count < 1 || shard.index < 0 || shard.index >= shard.count) {
    return invalid_argument(
        fmt::format("shard {}/{}\n  allowed: I/N with I from 0 to N - 1", shard.index, shard.count));
  }
  for (const std::int32_t length : questions.lengths_tokens) {
    if (length < 1 || length > config.max_position_embeddings) {
      return invalid_argument(fmt::format("length is {} tokens\n  allowed: 1 to the model's {} positions", length,
                                          config.max_position_embeddings));
    }
  }
  return {};
}

std::int64_t count_dense_chunks(const GenerateResult& result) {
  std::int64_t count = 0;
  for (const LayerReport& layer : result.layers) {
    for (std::size_t reason = 0; reason < layer.chunks_by_reason.size(); ++reason) {
      const auto why = static_cast<DenseReason>(reason);
      if (why != DenseReason::kNone && why != DenseReason::kFirstChunk) count += layer.chunks_by_reason[reason];
    }
  }
  return count;
}

Result<EvalRecord> answer(const LoadedModel& model, const RulerTask& task, const FittedSample& fitted,
                          const SelectorRun& selector, double encode_seconds, ThreadPool& pool) {
  GenerateOptions options = selector.options;
  options.max_tokens = task.generate_tokens();
  options.end_tokens = model.end_tokens;
  EvalRecord record;
  std::string bytes;
  GenerateCallbacks callbacks;
  callbacks.on_token = [&](std::int32_t token) { bytes += model.tokenizer.decode(std::span(&token, 1)); };
  callbacks.stop = [&] { return match_score(task.score_rule(), bytes, fitted.sample.answers) >= 1; };
  CA_ASSIGN_OR_RETURN(const GenerateResult result,
                      generate(*model.transformer, fitted.tokens, options, callbacks, pool));
  Utf8Stream stream;
  record.output = stream.push(bytes);
  record.output += stream.finish();
  record.selector = selector.label;
  record.score = match_score(task.score_rule(), bytes, fitted.sample.answers);
  record.answers = fitted.sample.answers;
  record.prompt_tokens = result.prompt_tokens;
  record.generated_tokens = static_cast<std::int32_t>(result.tokens.size());
  record.ttft_seconds = encode_seconds + result.prefill_seconds;
  record.decode_seconds = result.decode_seconds;
  const RunTotals totals = sum_layers(result);
  record.attention_seconds = totals.attention_seconds;
  record.stats = totals.stats;
  record.dense_chunks = count_dense_chunks(result);
  for (const LayerReport& layer : result.layers) record.nonfinite_rows += layer.nonfinite_rows;
  return record;
}

}  // namespace

Result<std::vector<std::int32_t>> encode_sample(const LoadedModel& model, const EvalSample& sample) {
  CA_ASSIGN_OR_RETURN(ChatPrompt chat, format_chat(model.chat_format, sample.prompt));
  chat.segments.push_back({sample.answer_prefix, false});
  return model.tokenizer.encode_segments(chat.segments, chat.add_special_tokens);
}

Result<RulerTasks> make_ruler_tasks(const RulerQuestions& questions, const RulerSources& sources,
                                    const LoadedModel& model) {
  CA_RETURN_IF_ERROR(check_questions(questions, model.transformer->config()));
  const CountTokens count_tokens = [&model](std::string_view text) -> Result<std::int64_t> {
    CA_ASSIGN_OR_RETURN(const std::vector<std::int32_t> tokens, model.tokenizer.encode(text, false));
    return static_cast<std::int64_t>(tokens.size());
  };
  RulerTasks tasks;
  for (const std::int32_t length : questions.lengths_tokens) {
    tasks.emplace_back();
    for (const std::string& name : questions.tasks) {
      CA_ASSIGN_OR_RETURN(auto task, make_ruler_task(name, length, sources, count_tokens));
      if (questions.samples > task->max_samples()) {
        return invalid_argument(fmt::format("{} samples of task {}\n  allowed: 1 to {}, the questions of its file",
                                            questions.samples, name, task->max_samples()));
      }
      tasks.back().push_back(std::move(task));
    }
  }
  return tasks;
}

Status for_each_sample(const RulerQuestions& questions, const RulerTasks& tasks, const OnSample& body) {
  for (std::size_t at = 0; at < questions.lengths_tokens.size(); ++at) {
    for (const auto& task : tasks[at]) {
      for (std::int32_t index = questions.shard.index; index < questions.samples; index += questions.shard.count) {
        CA_RETURN_IF_ERROR(body(*task, {questions.seed, task->name(), questions.lengths_tokens[at], index}));
      }
    }
  }
  return {};
}

Result<std::vector<EvalRecord>> evaluate_ruler(const RulerQuestions& questions, const RulerTasks& tasks,
                                               const std::vector<SelectorRun>& selectors, const LoadedModel& model,
                                               WorkFile* work, const OnRecord& on_record, ThreadPool& pool) {
  std::vector<EvalRecord> records = work != nullptr ? work->resumed() : std::vector<EvalRecord>();
  std::set<EvalRecord::Key> done;
  for (const EvalRecord& record : records) done.insert(record.key());
  const EncodeSample encode = [&model](const EvalSample& sample) { return encode_sample(model, sample); };

  const OnSample answer_sample = [&](const RulerTask& task, const SampleSeed& seed) -> Status {
    std::optional<FittedSample> fitted;  // made once, if any selector has to answer it
    double encode_seconds = 0;
    for (const SelectorRun& selector : selectors) {
      if (done.contains({std::string(seed.task), seed.length_tokens, seed.index, selector.label})) continue;
      if (!fitted) {
        CA_ASSIGN_OR_RETURN(fitted, fit_sample(task, seed, encode));
        const Stopwatch stopwatch;
        CA_ASSIGN_OR_RETURN(fitted->tokens, encode(fitted->sample));
        encode_seconds = stopwatch.seconds();
      }
      CA_ASSIGN_OR_RETURN(EvalRecord record, answer(model, task, *fitted, selector, encode_seconds, pool));
      record.task = seed.task;
      record.length_tokens = seed.length_tokens;
      record.index = seed.index;
      if (work != nullptr) CA_RETURN_IF_ERROR(work->append(record));
      if (on_record) on_record(record);
      records.push_back(std::move(record));
    }
    return {};
  };
  CA_RETURN_IF_ERROR(for_each_sample(questions, tasks, answer_sample));
  return records;
}

}  // namespace compact::engine
