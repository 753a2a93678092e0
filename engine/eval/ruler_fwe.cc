// Frequent words of a coded text. Wording: NVIDIA/RULER, scripts/data/synthetic/constants.py; counts:
// scripts/synthetic.yaml and freq_words_extraction.py.
#include <fmt/format.h>

#include <numbers>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "engine/eval/ruler_tasks.h"
#include "engine/eval/seeded_stream.h"

namespace compact::engine {
namespace {

constexpr std::int32_t kGenerateTokens = 50;
constexpr std::int32_t kTokensPerWordOfVocabulary = 50;
constexpr std::size_t kLetters = 6;
constexpr std::int64_t kAnswers = 3;
// The word of rank k = 1, 2, .. stands units / (zeta(2) k^2) times in the text, rounded down.
constexpr double kZeta2 = std::numbers::pi * std::numbers::pi / 6;

class FrequentWordsTask final : public RulerTask {
 public:
  explicit FrequentWordsTask(std::int64_t vocabulary) : vocabulary_(vocabulary) {}

  std::string_view name() const noexcept override { return "fwe"; }
  std::int32_t generate_tokens() const noexcept override { return kGenerateTokens; }
  // From here on the fourth rank, the last that is asked for, stands more often than the fifth:
  // units (1/16 - 1/25) / zeta(2) >= 1.
  std::int64_t min_units() const noexcept override { return 74; }
  std::int64_t max_units() const noexcept override { return kMaxHaystackUnits; }
  double tokens_per_unit() const noexcept override { return 4; }
  std::string more_units_hint() const override { return "a shorter length"; }

  EvalSample build(const SampleSeed& seed, std::int64_t units) const override {
    SeededStream vocabulary_stream(seed.stream("vocabulary"));
    const std::vector<std::string> vocabulary = draw_vocabulary(vocabulary_stream);
    std::vector<std::string_view> text;
    for (std::size_t i = 0; i < vocabulary.size(); ++i) {
      const auto rank = static_cast<double>(i + 1);
      const auto repeats = static_cast<std::size_t>(static_cast<double>(units) / (rank * rank) / kZeta2);
      text.insert(text.end(), repeats, vocabulary[i]);
    }
    SeededStream stream(seed.stream("text"));
    stream.shuffle(text);
    EvalSample sample;
    sample.prompt =
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. ";
    for (std::size_t i = 0; i < text.size(); ++i) {
      if (i > 0) sample.prompt += ' ';
      sample.prompt += text[i];
    }
    sample.prompt +=
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?";
    sample.answer_prefix = " Answer: According to the coded text above, the three most frequently appeared words are:";
    sample.answers.assign(vocabulary.begin() + 1, vocabulary.begin() + 1 + kAnswers);
    return sample;
  }

 private:
  // By rank; the first is noise.
  std::vector<std::string> draw_vocabulary(SeededStream& stream) const {
    std::vector<std::string> words = {"..."};
    std::unordered_set<std::string> seen;
    while (std::ssize(words) < vocabulary_) {
      std::string word;
      for (std::size_t i = 0; i < kLetters; ++i) word += static_cast<char>('a' + stream.below(26));
      if (seen.insert(word).second) words.push_back(std::move(word));
    }
    return words;
  }

  std::int64_t vocabulary_;
};

}  // namespace

Result<std::unique_ptr<RulerTask>> make_frequent_words_task(std::int32_t length_tokens) {
  const std::int64_t vocabulary = (length_tokens - kGenerateTokens) / kTokensPerWordOfVocabulary;
  if (vocabulary < kAnswers + 1) {
    return invalid_argument(
        fmt::format("task fwe at {} tokens has a vocabulary of {} words\n  allowed: {} tokens or more", length_tokens,
                    vocabulary, kGenerateTokens + kTokensPerWordOfVocabulary * (kAnswers + 1)));
  }
  return std::unique_ptr<RulerTask>(std::make_unique<FrequentWordsTask>(vocabulary));
}

}  // namespace compact::engine
