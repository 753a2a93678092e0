// Needles in a haystack. Wording: NVIDIA/RULER, scripts/data/synthetic/constants.py; parameters:
// scripts/synthetic.yaml.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>

#include "engine/eval/ruler_tasks.h"
#include "engine/eval/seeded_stream.h"

namespace compact::engine {
namespace {

enum class Haystack { kNoise, kEssay, kNeedles };
enum class Word { kPair, kNumber, kUuid };

struct NiahShape {
  std::string_view name;
  Haystack haystack = Haystack::kNoise;
  Word key = Word::kPair;
  Word value = Word::kNumber;
  std::int32_t num_keys = 1;
  std::int32_t values_per_key = 1;
  std::int32_t keys_asked = 1;
};

constexpr std::array kShapes = {
    NiahShape{"niah_single_1", Haystack::kNoise, Word::kPair, Word::kNumber, 1, 1, 1},
    NiahShape{"niah_single_2", Haystack::kEssay, Word::kPair, Word::kNumber, 1, 1, 1},
    NiahShape{"niah_single_3", Haystack::kEssay, Word::kPair, Word::kUuid, 1, 1, 1},
    NiahShape{"niah_multikey_1", Haystack::kEssay, Word::kPair, Word::kNumber, 4, 1, 1},
    NiahShape{"niah_multikey_2", Haystack::kNeedles, Word::kPair, Word::kNumber, 1, 1, 1},
    NiahShape{"niah_multikey_3", Haystack::kNeedles, Word::kUuid, Word::kUuid, 1, 1, 1},
    NiahShape{"niah_multivalue", Haystack::kEssay, Word::kPair, Word::kNumber, 1, 4, 1},
    NiahShape{"niah_multiquery", Haystack::kEssay, Word::kPair, Word::kNumber, 4, 1, 4},
};

// Forty depths in percent, as RULER spaces them: 0 to 100, rounded to even.
std::vector<std::int64_t> depths_in_percent() {
  std::vector<std::int64_t> depths;
  for (int i = 0; i < 40; ++i) depths.push_back(static_cast<std::int64_t>(std::nearbyint(100.0 * i / 39.0)));
  return depths;
}

std::string uuid4(SeededStream& stream) {
  const std::uint64_t high = (stream.next() & ~std::uint64_t{0xf000}) | 0x4000;
  const std::uint64_t low = (stream.next() & 0x3fffffffffffffffU) | 0x8000000000000000U;
  return fmt::format("{:08x}-{:04x}-{:04x}-{:04x}-{:012x}", high >> 32, (high >> 16) & 0xffff, high & 0xffff, low >> 48,
                     low & 0xffffffffffffU);
}

// "a", "a, and b", "a, b, and c".
std::string listing(const std::vector<std::string>& items) {
  std::string text = items.front();
  for (std::size_t i = 1; i < items.size(); ++i) text += (i + 1 == items.size() ? ", and " : ", ") + items[i];
  return text;
}

class NiahTask final : public RulerTask {
 public:
  NiahTask(const NiahShape& shape, const RulerSources& sources) : shape_(shape), sources_(sources) {}

  std::string_view name() const noexcept override { return shape_.name; }
  std::int32_t generate_tokens() const noexcept override { return 128; }
  std::int64_t min_units() const noexcept override { return shape_.num_keys * shape_.values_per_key; }
  std::int64_t max_units() const noexcept override { return kMaxHaystackUnits; }
  double tokens_per_unit() const noexcept override {
    return shape_.haystack == Haystack::kEssay ? 1.4 : shape_.haystack == Haystack::kNoise ? 24 : 40;
  }
  std::string more_units_hint() const override { return "a shorter length"; }

  EvalSample build(const SampleSeed& seed, std::int64_t units) const override {
    SeededStream stream(seed.stream("needles"));
    std::vector<std::string> keys;
    std::vector<std::vector<std::string>> values;  // [key][value]
    std::vector<std::string> needles;
    for (std::int32_t k = 0; k < shape_.num_keys; ++k) {
      keys.push_back(draw_new(shape_.key, stream, keys));
      values.emplace_back();
      for (std::int32_t v = 0; v < shape_.values_per_key; ++v) {
        values.back().push_back(draw_new(shape_.value, stream, values.back()));
        needles.push_back(needle(keys.back(), values.back().back()));
      }
    }
    stream.shuffle(needles);
    std::vector<std::string> asked;
    EvalSample sample;
    for (const std::int64_t i : stream.distinct_below(shape_.num_keys, shape_.keys_asked)) {
      asked.push_back(keys[static_cast<std::size_t>(i)]);
      const std::vector<std::string>& of_key = values[static_cast<std::size_t>(i)];
      sample.answers.insert(sample.answers.end(), of_key.begin(), of_key.end());
    }

    const bool plural = shape_.keys_asked * shape_.values_per_key > 1;
    const std::string kind = std::string(shape_.value == Word::kNumber ? "number" : "uuid") + (plural ? "s" : "");
    const std::string query = listing(asked);
    sample.prompt = fmt::format(
        "{} special magic {} {} hidden within the following text. Make sure to memorize it. I will quiz you about the "
        "{} "
        "afterwards.\n",
        plural ? "Some" : "A", kind, plural ? "are" : "is", kind);
    if (shape_.haystack == Haystack::kEssay) {
      append_essay(units, needles, stream, sample.prompt);
    } else {
      append_lines(seed, units, needles, stream, sample.prompt);
    }
    sample.prompt += fmt::format("\nWhat {} the special magic {} for {} mentioned in the provided text?",
                                 plural ? "are all" : "is", kind, query);
    sample.answer_prefix = fmt::format(" The special magic {} for {} mentioned in the provided text {}", kind, query,
                                       plural ? "are" : "is");
    return sample;
  }

 private:
  std::string draw(Word kind, SeededStream& stream) const {
    switch (kind) {
      case Word::kNumber: return fmt::format("{}", 1'000'000 + stream.below(9'000'000));
      case Word::kUuid: return uuid4(stream);
      case Word::kPair: break;
    }
    const std::vector<std::string>& first = sources_.words->first_halves();
    const std::vector<std::string>& second = sources_.words->second_halves();
    const std::string& half = first[stream.below(first.size())];
    return half + "-" + second[stream.below(second.size())];
  }

  std::string draw_new(Word kind, SeededStream& stream, const std::vector<std::string>& taken) const {
    std::string word = draw(kind, stream);
    while (std::find(taken.begin(), taken.end(), word) != taken.end()) word = draw(kind, stream);
    return word;
  }

  std::string needle(const std::string& key, const std::string& value) const {
    return fmt::format("One of the special magic {} for {} is: {}.",
                       shape_.value == Word::kNumber ? "numbers" : "uuids", key, value);
  }

  // The first `words` words of the prose; needles before sentences at depths drawn from the forty.
  void append_essay(std::int64_t words, const std::vector<std::string>& needles, SeededStream& stream,
                    std::string& text) const {
    const Prose& prose = *sources_.prose;
    std::int64_t sentences = prose.ends_sentence(words - 1) ? 0 : 1;  // a sentence cut short counts
    for (std::int64_t i = 0; i < words; ++i) sentences += prose.ends_sentence(i) ? 1 : 0;
    static const std::vector<std::int64_t> kDepths = depths_in_percent();
    std::vector<std::int64_t> places;
    for (const std::int64_t i :
         stream.distinct_below(static_cast<std::int64_t>(kDepths.size()), static_cast<std::int64_t>(needles.size()))) {
      places.push_back(sentences * kDepths[static_cast<std::size_t>(i)] / 100);
    }
    std::sort(places.begin(), places.end());
    std::size_t next = 0;
    bool first = true;
    const auto append = [&](std::string_view piece) {
      if (!first) text += ' ';
      first = false;
      text += piece;
    };
    const auto append_needles = [&](std::int64_t sentences_done) {
      while (next < places.size() && places[next] == sentences_done) append(needles[next++]);
    };
    append_needles(0);
    std::int64_t done = 0;
    for (std::int64_t i = 0; i < words; ++i) {
      append(prose.word(i));
      if (i + 1 == words || prose.ends_sentence(i)) append_needles(++done);
    }
  }

  // Lines of noise, or of needles nobody asks for; our needles before lines of their own.
  void append_lines(const SampleSeed& seed, std::int64_t lines, const std::vector<std::string>& needles,
                    SeededStream& stream, std::string& text) const {
    // The lines have a stream of their own: the first n are the same for every n.
    SeededStream line_stream(seed.stream("lines"));
    std::vector<std::int64_t> places = stream.distinct_below(lines, static_cast<std::int64_t>(needles.size()));
    std::sort(places.begin(), places.end());
    std::size_t next = 0;
    for (std::int64_t i = 0; i < lines; ++i) {
      if (i > 0) text += '\n';
      if (next < places.size() && places[next] == i) {
        text += needles[next++];
        text += '\n';
      }
      if (shape_.haystack == Haystack::kNoise) {
        text += kNoiseLine;
      } else {
        const std::string key = draw(shape_.key, line_stream);
        text += needle(key, draw(shape_.value, line_stream));
      }
    }
  }

  NiahShape shape_;
  RulerSources sources_;
};

}  // namespace

Result<std::unique_ptr<RulerTask>> make_niah_task(std::string_view name, const RulerSources& sources) {
  const auto shape = std::find_if(kShapes.begin(), kShapes.end(), [&](const NiahShape& s) { return s.name == name; });
  if (shape == kShapes.end()) return std::unique_ptr<RulerTask>();
  if (shape->haystack == Haystack::kEssay && sources.prose == nullptr) {
    return missing_source(name, "prose", "--essays FILE; its default is a path in this project's sources");
  }
  if (shape->key == Word::kPair && sources.words == nullptr) {
    return missing_source(name, "words", "--words FILE; its default is a path in this project's sources");
  }
  return std::unique_ptr<RulerTask>(std::make_unique<NiahTask>(*shape, sources));
}

}  // namespace compact::engine
