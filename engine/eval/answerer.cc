#include "engine/eval/answerer.h"

#include <optional>
#include <span>
#include <utility>

#include "engine/text/utf8.h"

namespace compact::engine {

double state_bytes_per_token(const ModelConfig& config, DType kv_dtype, std::int64_t kv_bytes,
                             std::int64_t summary_bytes) noexcept {
  const std::int64_t kv_bytes_per_token =
      std::int64_t{config.num_hidden_layers} * 2 * config.num_key_value_heads * config.head_dim * dtype_bytes(kv_dtype);
  return static_cast<double>(summary_bytes) * static_cast<double>(kv_bytes_per_token) / static_cast<double>(kv_bytes);
}

Result<Answerer> Answerer::create(const LoadedModel& model, WorkFile* work, ThreadPool& pool) {
  Answerer answerer(model, work, pool);
  if (work != nullptr) {
    CA_ASSIGN_OR_RETURN(answerer.records_, answers_of(work->resumed()));
  }
  for (const EvalRecord& record : answerer.records_) answerer.done_.insert(record.key());
  return answerer;
}

Status Answerer::ask(const QuestionName& name, const std::vector<SelectorRun>& selectors, const MakeQuestion& make) {
  std::optional<EvalQuestion> question;
  for (const SelectorRun& selector : selectors) {
    if (has(name, selector.label)) continue;
    if (!question) {
      CA_ASSIGN_OR_RETURN(question, make());
    }
    CA_ASSIGN_OR_RETURN(EvalRecord record, answer(*question, selector));
    record.task = name.task;
    record.length_tokens = name.length_tokens;
    record.index = name.index;
    if (work_ != nullptr) CA_RETURN_IF_ERROR(work_->append(to_json(record)));
    if (on_record_) on_record_(record);
    done_.insert(record.key());
    records_.push_back(std::move(record));
  }
  return {};
}

Result<EvalRecord> Answerer::answer(const EvalQuestion& question, const SelectorRun& selector) const {
  GenerateOptions options = selector.options;
  options.max_tokens = question.generate_tokens;
  options.end_tokens = model_->end_tokens;
  std::string bytes;
  GenerateCallbacks callbacks;
  callbacks.on_token = [&](std::int32_t token) { bytes += model_->tokenizer.decode(std::span(&token, 1)); };
  callbacks.stop = [&] { return question.is_certain ? question.is_certain(bytes) : question.score(bytes) >= 1; };
  CA_ASSIGN_OR_RETURN(const GenerateResult result,
                      generate(*model_->transformer, question.tokens, options, callbacks, *pool_));
  EvalRecord record;
  Utf8Stream stream;
  record.output = stream.push(bytes);
  record.output += stream.finish();
  record.selector = selector.label;
  record.score = question.score(bytes);
  record.answers = question.answers;
  record.prompt_tokens = result.prompt_tokens;
  record.generated_tokens = static_cast<std::int32_t>(result.tokens.size());
  record.ttft_seconds = question.encode_seconds + result.prefill_seconds;
  record.decode_seconds = result.decode_seconds;
  record.state_bytes_per_token =
      state_bytes_per_token(model_->transformer->config(), options.kv_dtype, result.kv_bytes, result.summary_bytes);
  record.add(result.layers);
  return record;
}

}  // namespace compact::engine
