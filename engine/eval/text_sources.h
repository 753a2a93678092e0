/// What prompts are made of: prose, words for keys, questions with documents. All from files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "compact/status.h"

namespace compact::engine {

/// Prose as words, with the ends of its sentences.
class Prose {
 public:
  /// White space of any kind separates words. Errors: kIoError (the file), kInvalidArgument (fewer than 100 words).
  [[nodiscard]] static Result<Prose> load(const std::filesystem::path& path);
  [[nodiscard]] static Result<Prose> parse(std::string text, std::string_view name);

  [[nodiscard]] std::int64_t num_words() const noexcept { return static_cast<std::int64_t>(words_.size()); }
  /// Word i of the prose repeated without end.
  [[nodiscard]] std::string_view word(std::int64_t i) const noexcept;
  /// Whether a sentence ends with word i: it ends in . ? or !, closing quotes and brackets aside, and is no title or
  /// initial (Mr., J.), and the next word does not begin in lower case.
  [[nodiscard]] bool ends_sentence(std::int64_t i) const noexcept;
  [[nodiscard]] const std::string& digest() const noexcept { return digest_; }

 private:
  struct Word {
    std::uint32_t begin = 0;
    std::uint32_t length = 0;
    bool ends_sentence = false;
  };
  std::string text_;
  std::vector<Word> words_;
  std::string digest_;
};

/// Words that keys are made of.
class WordList {
 public:
  /// One word a line. With one file both halves of a key come from it; with two the first half (RULER: adjectives)
  /// comes from the first. Errors: kIoError; kInvalidArgument for no file, more than two, or fewer than 100 words.
  [[nodiscard]] static Result<WordList> load(const std::vector<std::filesystem::path>& paths);

  [[nodiscard]] const std::vector<std::string>& first_halves() const noexcept { return first_; }
  [[nodiscard]] const std::vector<std::string>& second_halves() const noexcept {
    return second_.empty() ? first_ : second_;
  }
  /// All words, each once, sorted.
  [[nodiscard]] const std::vector<std::string>& all() const noexcept { return all_; }
  [[nodiscard]] const std::string& digest() const noexcept { return digest_; }

 private:
  std::vector<std::string> first_;
  std::vector<std::string> second_;  // empty: the same as first_
  std::vector<std::string> all_;
  std::string digest_;
};

}  // namespace compact::engine
