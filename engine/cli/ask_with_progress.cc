#include "engine/cli/ask_with_progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <memory>

#include "engine/report/progress.h"

namespace compact::engine {
namespace {

// Attention grows with the square of the length, the rest evenly; both are about equal at 4096 tokens.
double cost_of(std::int32_t tokens) { return static_cast<double>(tokens) * (tokens + 4096.0); }

}  // namespace

void AskProgress::add(const QuestionName& name, const std::vector<SelectorRun>& selectors, const Answerer& answerer) {
  for (const SelectorRun& selector : selectors) {
    if (answerer.has(name, selector.label)) continue;
    cost_ += cost_of(name.length_tokens);
    ++questions_;
  }
}

void AskProgress::watch(Answerer& answerer) const {
  fmt::print(stderr, "{}: {} answers to give ({} are there)\n", title_, questions_, answerer.records().size());
  const bool on_terminal = isatty(STDERR_FILENO) != 0;
  answerer.observe([bar = std::make_shared<ProgressBar>(title_, cost_), total = questions_, answered = std::int64_t{0},
                    on_terminal](const EvalRecord& record) mutable {
    bar->advance(cost_of(record.length_tokens),
                 fmt::format("{} {} #{} {}", record.task, record.length_tokens, record.index, record.selector));
    if (++answered % 100 == 0 && !on_terminal) fmt::print(stderr, "{} / {} answers\n", answered, total);
  });
}

Status ask_ruler(const std::string& title, const RulerQuestions& questions, const RulerTasks& tasks,
                 const std::vector<SelectorRun>& selectors, const LoadedModel& model, Answerer& answerer) {
  AskProgress progress(title);
  CA_RETURN_IF_ERROR(for_each_sample(questions, tasks, [&](const RulerTask&, const SampleSeed& seed) -> Status {
    progress.add({std::string(seed.task), seed.length_tokens, seed.index}, selectors, answerer);
    return {};
  }));
  progress.watch(answerer);
  return evaluate_ruler(questions, tasks, selectors, model, answerer);
}

}  // namespace compact::engine
