// Questions about one of many documents. Wording: NVIDIA/RULER, scripts/data/synthetic/constants.py; which documents:
// qa.py.
#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "engine/eval/ruler_tasks.h"
#include "engine/eval/seeded_stream.h"

namespace compact::engine {
namespace {

class QuestionTask final : public RulerTask {
 public:
  QuestionTask(std::string_view name, const QuestionSet& set) : name_(name), set_(set) {
    for (const Question& question : set.questions()) {
      min_units_ = std::max(min_units_, static_cast<std::int64_t>(question.documents.size()));
    }
  }

  std::string_view name() const noexcept override { return name_; }
  std::int32_t generate_tokens() const noexcept override { return 32; }
  ScoreRule score_rule() const noexcept override { return ScoreRule::kPart; }
  std::int64_t min_units() const noexcept override { return min_units_; }
  std::int64_t max_units() const noexcept override { return kMaxHaystackUnits; }
  std::int32_t max_samples() const noexcept override { return static_cast<std::int32_t>(set_.questions().size()); }
  double tokens_per_unit() const noexcept override { return 160; }
  std::string more_units_hint() const override { return "a shorter length"; }

  EvalSample build(const SampleSeed& seed, std::int64_t units) const override {
    const Question& question = set_.questions()[static_cast<std::size_t>(seed.index)];
    SeededStream stream(seed.stream("documents"));
    std::vector<std::int32_t> documents = choose(question, units, stream);
    stream.shuffle(documents);
    std::string context;
    for (std::size_t i = 0; i < documents.size(); ++i) {
      context += fmt::format("{}Document {}:\n{}", i == 0 ? "" : "\n\n", i + 1,
                             set_.documents()[static_cast<std::size_t>(documents[i])]);
    }
    constexpr std::string_view kTask =
        "Answer the question based on the given documents. Only give me the answer and do not output any other words.";
    return {fmt::format("{}\n\nThe following are given documents.\n\n{}\n\n{}\n\nQuestion: {}", kTask, context, kTask,
                        question.text),
            " Answer:", question.answers};
  }

 private:
  // The question's own documents, then those of the same article, then any; all of them, again and again, when there
  // are too few.
  std::vector<std::int32_t> choose(const Question& question, std::int64_t units, SeededStream& stream) const {
    const auto num_documents = static_cast<std::int64_t>(set_.documents().size());
    std::vector<std::int32_t> chosen;
    if (units >= num_documents) {
      for (std::int64_t i = 0; i < units; ++i) chosen.push_back(static_cast<std::int32_t>(i % num_documents));
      return chosen;
    }
    chosen = question.documents;
    const auto add_drawn = [&](const std::vector<std::int32_t>& from) {
      const std::int64_t wanted = std::min(std::max<std::int64_t>(0, units - std::ssize(chosen)), std::ssize(from));
      for (const std::int64_t i : stream.distinct_below(std::ssize(from), wanted)) {
        chosen.push_back(from[static_cast<std::size_t>(i)]);
      }
    };
    add_drawn(question.related);
    std::vector<bool> taken(static_cast<std::size_t>(num_documents));
    for (const std::int32_t document : chosen) taken[static_cast<std::size_t>(document)] = true;
    std::vector<std::int32_t> others;
    for (std::int32_t i = 0; i < num_documents; ++i) {
      if (!taken[static_cast<std::size_t>(i)]) others.push_back(i);
    }
    add_drawn(others);
    return chosen;
  }

  std::string_view name_;
  const QuestionSet& set_;
  std::int64_t min_units_ = 1;
};

}  // namespace

Result<std::unique_ptr<RulerTask>> make_question_task(std::string_view name, const RulerSources& sources) {
  const bool first = name == "qa_1";
  const QuestionSet* set = first ? sources.qa_1 : sources.qa_2;
  if (set == nullptr) {
    return missing_source(name, "questions with documents",
                          first ? "--qa-1 FILE (SQuAD 2.0: dev-v2.0.json), or --tasks generated"
                                : "--qa-2 FILE (HotpotQA: hotpot_dev_distractor_v1.json), or --tasks generated");
  }
  return std::unique_ptr<RulerTask>(std::make_unique<QuestionTask>(first ? "qa_1" : "qa_2", *set));
}

}  // namespace compact::engine
