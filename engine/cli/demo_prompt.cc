#include "engine/cli/demo_prompt.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <random>
#include <utility>

namespace compact::engine {
namespace {

constexpr std::array kAdjectives = {"amber", "brisk", "clever", "dusty", "eager",  "frosty", "gentle", "hollow",
                                    "ivory", "jolly", "keen",   "lucid", "mellow", "noble",  "quiet",  "silver"};
constexpr std::array kNouns = {"anchor", "bridge", "candle", "desert",  "engine", "falcon", "garden", "harbor",
                               "island", "jacket", "kettle", "lantern", "meadow", "pepper", "river",  "saddle"};
constexpr std::size_t kNumNeedles = 4;
constexpr std::string_view kIntroduction =
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n";

// First place at or after `from` where a sentence has ended and the next begins.
std::size_t sentence_start(std::string_view prose, std::size_t from) {
  for (std::size_t i = from; i + 1 < prose.size(); ++i) {
    if (prose[i] == '.' && (prose[i + 1] == ' ' || prose[i + 1] == '\n')) return i + 2;
  }
  return prose.size();
}

}  // namespace

Result<HaystackPrompt> make_haystack_prompt(std::string_view prose, std::int32_t target_tokens, std::uint64_t seed,
                                            const Tokenizer& tokenizer) {
  CA_ASSIGN_OR_RETURN(const std::vector<std::int32_t> prose_tokens, tokenizer.encode(prose, false));
  constexpr std::int32_t kFrameTokens = 300;  // introduction, four facts and the question take less than this
  const std::int32_t prose_target = target_tokens - kFrameTokens;
  if (prose_target < 1000) {
    return invalid_argument(fmt::format("the demo's length is {} tokens\n  allowed: 1,300 or more", target_tokens));
  }
  if (std::ssize(prose_tokens) < prose_target) {
    return invalid_argument(
        fmt::format("the text has {} tokens; a demo of {} tokens needs {}\n"
                    "  try: a longer text, or --tokens {}",
                    prose_tokens.size(), target_tokens, prose_target, prose_tokens.size()));
  }
  // The tokens of a prefix are not quite the prefix of the tokens; at a sentence end the difference is a token or two.
  const std::string prefix = tokenizer.decode(std::span(prose_tokens).first(static_cast<std::size_t>(prose_target)));
  prose = prose.substr(0, std::min(prose.size(), sentence_start(prose, prefix.size())));

  std::mt19937_64 random(seed);
  std::vector<std::pair<std::string, std::string>> facts;  // (key, value)
  while (facts.size() < kNumNeedles) {
    const std::string key =
        fmt::format("{}-{}", kAdjectives[random() % kAdjectives.size()], kNouns[random() % kNouns.size()]);
    const bool taken = std::any_of(facts.begin(), facts.end(), [&](const auto& fact) { return fact.first == key; });
    if (!taken) facts.emplace_back(key, fmt::format("{}", 1000000 + random() % 9000000));
  }
  const std::size_t asked = random() % kNumNeedles;

  HaystackPrompt prompt;
  prompt.num_needles = static_cast<std::int32_t>(kNumNeedles);
  prompt.text = kIntroduction;
  std::size_t begin = 0;
  for (std::size_t i = 0; i < kNumNeedles; ++i) {
    // Depths of about 1/8, 3/8, 5/8 and 7/8.
    const std::size_t end = sentence_start(prose, prose.size() * (2 * i + 1) / (2 * kNumNeedles));
    prompt.text += prose.substr(begin, end - begin);
    begin = end;
    const auto at = i == asked ? prompt.needle_offsets.begin() : prompt.needle_offsets.end();
    prompt.needle_offsets.insert(at, prompt.text.size());
    prompt.text += fmt::format("One of the special magic numbers for {} is: {}. ", facts[i].first, facts[i].second);
  }
  prompt.text += prose.substr(begin);
  const std::string& key = facts[asked].first;
  prompt.question = fmt::format("What is the special magic number for {} mentioned in the provided text?", key);
  prompt.text +=
      fmt::format("\n{} The special magic number for {} mentioned in the provided text is", prompt.question, key);
  prompt.expected = facts[asked].second;
  return prompt;
}

}  // namespace compact::engine
