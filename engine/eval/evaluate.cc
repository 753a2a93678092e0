#include "engine/eval/evaluate.h"

#include <fmt/format.h>

#include <set>
#include <utility>

#include "engine/model/stopwatch.h"

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
  for (const std::int32_t length : questions.lengths_tokens) {
    if (length < 1 || length > config.max_position_embeddings) {
      return invalid_argument(fmt::format("length is {} tokens\n  allowed: 1 to the model's {} positions", length,
                                          config.max_position_embeddings));
    }
  }
  return {};
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

Result<std::vector<RecallPrompt>> recall_prompts(const RulerQuestions& questions, const RulerTasks& tasks,
                                                 const LoadedModel& model) {
  std::vector<RecallPrompt> prompts;
  const OnSample add_prompt = [&](const RulerTask& task, const SampleSeed& seed) -> Status {
    CA_ASSIGN_OR_RETURN(FittedSample fitted,
                        fit_sample(task, seed, [&](const EvalSample& s) { return encode_sample(model, s); }));
    prompts.push_back({fmt::format("{} {}", task.name(), seed.length_tokens), std::move(fitted.tokens)});
    return {};
  };
  CA_RETURN_IF_ERROR(for_each_sample(questions, tasks, add_prompt));
  return prompts;
}

Status evaluate_ruler(const RulerQuestions& questions, const RulerTasks& tasks,
                      const std::vector<SelectorRun>& selectors, const LoadedModel& model, Answerer& answerer) {
  const EncodeSample encode = [&model](const EvalSample& sample) { return encode_sample(model, sample); };
  return for_each_sample(questions, tasks, [&](const RulerTask& task, const SampleSeed& seed) {
    return answerer.ask({std::string(seed.task), seed.length_tokens, seed.index}, selectors,
                        [&]() -> Result<EvalQuestion> {
                          CA_ASSIGN_OR_RETURN(FittedSample fitted, fit_sample(task, seed, encode));
                          const Stopwatch stopwatch;
                          EvalQuestion question;
                          CA_ASSIGN_OR_RETURN(question.tokens, encode(fitted.sample));
                          question.encode_seconds = stopwatch.seconds();
                          question.generate_tokens = task.generate_tokens();
                          question.answers = fitted.sample.answers;
                          question.score = [rule = task.score_rule(), answers = std::move(fitted.sample.answers)](
                                               std::string_view output) { return match_score(rule, output, answers); };
                          return question;
                        });
  });
}

}  // namespace compact::engine
