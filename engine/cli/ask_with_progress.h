/// RULER's questions asked with a progress bar, for the commands that ask them.
#pragma once

#include <string>
#include <vector>

#include "compact/status.h"
#include "engine/eval/answerer.h"
#include "engine/eval/evaluate.h"

namespace compact::engine {

/// What is to be asked, for the progress bar: a question of this length to this selector costs so much.
class AskProgress {
 public:
  explicit AskProgress(std::string title) : title_(std::move(title)) {}
  /// Counts the questions that `answerer` has not.
  void add(const QuestionName& name, const std::vector<SelectorRun>& selectors, const Answerer& answerer);
  [[nodiscard]] std::int64_t questions() const noexcept { return questions_; }
  /// Shows from now on what `answerer` answers. A log gets a line now and then instead.
  void watch(Answerer& answerer) const;

 private:
  std::string title_;
  double cost_ = 0;
  std::int64_t questions_ = 0;
};

/// evaluate_ruler with a line that says how much there is to do, and a progress bar.
[[nodiscard]] Status ask_ruler(const std::string& title, const RulerQuestions& questions, const RulerTasks& tasks,
                               const std::vector<SelectorRun>& selectors, const LoadedModel& model, Answerer& answerer);

}  // namespace compact::engine
