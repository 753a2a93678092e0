// Common words of a numbered list. Wording: NVIDIA/RULER, scripts/data/synthetic/constants.py; counts:
// scripts/synthetic.yaml and common_words_extraction.py.
#include <fmt/format.h>

#include <string>
#include <utility>
#include <vector>

#include "engine/eval/ruler_tasks.h"
#include "engine/eval/seeded_stream.h"

namespace compact::engine {
namespace {

constexpr std::int64_t kCommonWords = 10;
constexpr std::string_view kAnswerPrefix = " Answer: The top 10 words that appear most often in the list are:";

// How often the words of a list stand in it.
struct ListShape {
  std::int32_t common_repeats = 0;
  std::int32_t other_repeats = 0;
};
struct CweShape {
  std::int64_t example_words = 0;
  ListShape example;
  ListShape asked;
};
constexpr std::int32_t kShortBelowTokens = 4096;
constexpr CweShape kShort = {20, {3, 1}, {6, 1}};
constexpr CweShape kUsual = {40, {10, 3}, {30, 3}};

// "1. word 2. word ...".
std::string numbered(const std::vector<std::string_view>& words) {
  std::string text;
  for (std::size_t i = 0; i < words.size(); ++i) {
    text += fmt::format("{}{}. {}", i == 0 ? "" : " ", i + 1, words[i]);
  }
  return text;
}

class CommonWordsTask final : public RulerTask {
 public:
  CommonWordsTask(const WordList& words, const CweShape& shape) : words_(words), shape_(shape) {}

  std::string_view name() const noexcept override { return "cwe"; }
  std::int32_t generate_tokens() const noexcept override { return 120; }
  std::int64_t min_units() const noexcept override { return kCommonWords + 1; }
  std::int64_t max_units() const noexcept override { return static_cast<std::int64_t>(words_.all().size()); }
  double tokens_per_unit() const noexcept override { return 6.0 * shape_.asked.other_repeats; }
  std::string more_units_hint() const override { return "a shorter length, or --words FILE with more words"; }

  EvalSample build(const SampleSeed& seed, std::int64_t units) const override {
    SeededStream example_stream(seed.stream("example"));
    SeededStream stream(seed.stream("words"));
    const Problem example = make_problem(example_stream, shape_.example_words, shape_.example);
    Problem problem = make_problem(stream, units, shape_.asked);
    return {fmt::format("{}{} {}\n{}", example.prompt, kAnswerPrefix, numbered(example.common), problem.prompt),
            std::string(kAnswerPrefix),
            {problem.common.begin(), problem.common.end()}};
  }

 private:
  struct Problem {
    std::string prompt;
    std::vector<std::string_view> common;
  };

  Problem make_problem(SeededStream& stream, std::int64_t num_words, const ListShape& shape) const {
    Problem problem;
    std::vector<std::string_view> list;
    for (const std::int64_t i : stream.distinct_below(max_units(), num_words)) {
      const std::string_view word = words_.all()[static_cast<std::size_t>(i)];
      const bool is_common = std::ssize(problem.common) < kCommonWords;
      if (is_common) problem.common.push_back(word);
      list.insert(list.end(), static_cast<std::size_t>(is_common ? shape.common_repeats : shape.other_repeats), word);
    }
    stream.shuffle(list);
    problem.prompt = fmt::format(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n{}\nQuestion: What are the 10 most common words in the above list?",
        numbered(list));
    return problem;
  }

  const WordList& words_;
  CweShape shape_;
};

}  // namespace

Result<std::unique_ptr<RulerTask>> make_common_words_task(std::int32_t length_tokens, const RulerSources& sources) {
  if (sources.words == nullptr)
    return missing_source("cwe", "words", "--words FILE; its default is a path in this project's sources");
  return std::unique_ptr<RulerTask>(
      std::make_unique<CommonWordsTask>(*sources.words, length_tokens < kShortBelowTokens ? kShort : kUsual));
}

}  // namespace compact::engine
