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

Status check_run(const RulerRun& run, const ModelConfig& config) {
  if (run.tasks.empty() || run.lengths_tokens.empty() || run.selectors.empty()) {
    return invalid_argument("nothing to evaluate\n  allowed: at least one task, one length and one selector");
  }
  if (run.samples < 1) {
    return invalid_argument(fmt::format("{} samples of each task\n  allowed: 1 or more", run.samples));
  }
  if (run.shard.count < 1 || run.shard.index < 0 || run.shard.index >= run.shard.count) {
    return invalid_argument(
        fmt::format("shard {}/{}\n  allowed: I/N with I from 0 to N - 1", run.shard.index, run.shard.count));
  }
  for (const std::int32_t length : run.lengths_tokens) {
    if (length < 1 || length > config.max_position_embeddings) {
      return invalid_argument(fmt::format("length is {} tokens\n  allowed: 1 to the model's {} positions", length,
                                          config.max_position_embeddings));
    }
  }
  std::set<std::string> labels;
  for (const SelectorRun& selector : run.selectors) {
    if (!labels.insert(selector.label).second) {
      return invalid_argument(fmt::format("selector '{}' is named twice\n  allowed: each once", selector.label));
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
                      generate(model.transformer, fitted.tokens, options, callbacks, pool));
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

Result<RulerTasks> make_ruler_tasks(const RulerRun& run, const RulerSources& sources, const LoadedModel& model) {
  CA_RETURN_IF_ERROR(check_run(run, model.transformer.config()));
  const CountTokens count_tokens = [&model](std::string_view text) -> Result<std::int64_t> {
    CA_ASSIGN_OR_RETURN(const std::vector<std::int32_t> tokens, model.tokenizer.encode(text, false));
    return static_cast<std::int64_t>(tokens.size());
  };
  RulerTasks tasks;
  for (const std::int32_t length : run.lengths_tokens) {
    tasks.emplace_back();
    for (const std::string& name : run.tasks) {
      CA_ASSIGN_OR_RETURN(auto task, make_ruler_task(name, length, sources, count_tokens));
      tasks.back().push_back(std::move(task));
    }
  }
  return tasks;
}

Result<std::vector<EvalRecord>> evaluate_ruler(const RulerRun& run, const RulerTasks& tasks, const LoadedModel& model,
                                               WorkFile* work, const OnRecord& on_record, ThreadPool& pool) {
  std::vector<EvalRecord> records = work != nullptr ? work->resumed() : std::vector<EvalRecord>();
  std::set<EvalRecord::Key> done;
  for (const EvalRecord& record : records) done.insert(record.key());
  const EncodeSample encode = [&model](const EvalSample& sample) { return encode_sample(model, sample); };

  for (std::size_t at = 0; at < run.lengths_tokens.size(); ++at) {
    for (const auto& task : tasks[at]) {
      for (std::int32_t index = run.shard.index; index < run.samples; index += run.shard.count) {
        const SampleSeed seed{run.seed, task->name(), run.lengths_tokens[at], index};
        std::optional<FittedSample> fitted;
        double encode_seconds = 0;
        for (const SelectorRun& selector : run.selectors) {
          if (done.contains({std::string(task->name()), seed.length_tokens, index, selector.label})) continue;
          if (!fitted) {
            CA_ASSIGN_OR_RETURN(fitted, fit_sample(*task, seed, encode));
            const Stopwatch stopwatch;
            CA_ASSIGN_OR_RETURN(fitted->tokens, encode(fitted->sample));
            encode_seconds = stopwatch.seconds();
          }
          CA_ASSIGN_OR_RETURN(EvalRecord record, answer(model, *task, *fitted, selector, encode_seconds, pool));
          record.task = task->name();
          record.length_tokens = seed.length_tokens;
          record.index = index;
          if (work != nullptr) CA_RETURN_IF_ERROR(work->append(record));
          if (on_record) on_record(record);
          records.push_back(std::move(record));
        }
      }
    }
  }
  return records;
}

}  // namespace compact::engine
