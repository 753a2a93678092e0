// Variable tracking: one chain of four hops in noise. Wording and worked example: NVIDIA/RULER,
// scripts/data/synthetic/{constants,variable_tracking}.py.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <string>
#include <utility>

#include "engine/eval/ruler_tasks.h"
#include "engine/eval/seeded_stream.h"

namespace compact::engine {
namespace {

constexpr std::int64_t kHops = 4;
constexpr std::int64_t kVariables = kHops + 1;
constexpr std::int64_t kExampleTokens = 500;

std::vector<std::string> draw_names(SeededStream& stream, std::size_t letters) {
  std::vector<std::string> names;
  while (names.size() < static_cast<std::size_t>(kVariables)) {
    std::string name;
    for (std::size_t i = 0; i < letters; ++i) name += static_cast<char>('A' + stream.below(26));
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(std::move(name));
  }
  return names;
}

// What is asked about one chain among `lines` lines of noise, up to where the answer begins.
struct Problem {
  std::string prompt;
  std::string answer_prefix;
  std::vector<std::string> names;
};

Problem make_problem(SeededStream& stream, std::size_t letters, std::int64_t lines) {
  Problem problem;
  problem.names = draw_names(stream, letters);
  const std::string value = fmt::format("{}", 10000 + stream.below(89999));
  std::vector<std::string> chain = {fmt::format("VAR {} = {}", problem.names[0], value)};
  for (std::size_t i = 1; i < problem.names.size(); ++i) {
    chain.push_back(fmt::format("VAR {} = VAR {} ", problem.names[i], problem.names[i - 1]));
  }
  std::vector<std::int64_t> places = stream.distinct_below(lines, kVariables);
  std::sort(places.begin(), places.end());

  problem.prompt = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n";
  std::size_t next = 0;
  for (std::int64_t i = 0; i < lines; ++i) {
    if (i > 0) problem.prompt += '\n';
    if (next < places.size() && places[next] == i) {
      problem.prompt += chain[next++];
      problem.prompt += '\n';
    }
    problem.prompt += kNoiseLine;
  }
  problem.prompt +=
      fmt::format("\nQuestion: Find all variables that are assigned the value {} in the text above.", value);
  // The blank at the end is RULER's.
  problem.answer_prefix = fmt::format(
      " Answer: According to the chain(s) of variable assignment in the text above, {} variables are assigned the "
      "value "
      "{}, they are: ",
      kVariables, value);
  return problem;
}

// The worked example has names of three letters.
constexpr std::size_t kExampleLetters = 3;

class VariableTrackingTask final : public RulerTask {
 public:
  explicit VariableTrackingTask(std::int64_t example_lines) : example_lines_(example_lines) {}

  std::string_view name() const noexcept override { return "vt"; }
  std::int32_t generate_tokens() const noexcept override { return 30; }
  std::int64_t min_units() const noexcept override { return kVariables; }
  std::int64_t max_units() const noexcept override { return kMaxHaystackUnits; }
  double tokens_per_unit() const noexcept override { return 24; }
  std::string more_units_hint() const override { return "a shorter length"; }

  EvalSample build(const SampleSeed& seed, std::int64_t units) const override {
    SeededStream example_stream(seed.stream("example"));
    SeededStream stream(seed.stream("chain"));
    const Problem example = make_problem(example_stream, kExampleLetters, example_lines_);
    Problem problem = make_problem(stream, 5, units);
    return {fmt::format("{}{} {}\n\n{}", example.prompt, example.answer_prefix, fmt::join(example.names, " "),
                        problem.prompt),
            std::move(problem.answer_prefix), std::move(problem.names)};
  }

 private:
  std::int64_t example_lines_;
};

}  // namespace

Result<std::unique_ptr<RulerTask>> make_variable_tracking_task(const CountTokens& count_tokens) {
  // As many lines as 500 tokens hold, its solution aside; every sample's example has that many.
  std::int64_t lines = kVariables;
  for (;; ++lines) {
    SeededStream stream("vt/example/size");
    const Problem example = make_problem(stream, kExampleLetters, lines + 1);
    CA_ASSIGN_OR_RETURN(const std::int64_t tokens, count_tokens(example.prompt + example.answer_prefix));
    if (tokens > kExampleTokens) break;
  }
  return std::unique_ptr<RulerTask>(std::make_unique<VariableTrackingTask>(lines));
}

}  // namespace compact::engine
