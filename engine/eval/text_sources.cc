#include "engine/eval/text_sources.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <limits>
#include <utility>

#include "engine/eval/digest.h"
#include "engine/loader/text_file.h"

namespace compact::engine {
namespace {

constexpr std::size_t kFewestWords = 100;
// Abbreviations that end in a period inside a sentence, in English prose.
constexpr std::array<std::string_view, 15> kAbbreviations = {
    "mr.", "mrs.", "ms.", "dr.", "st.", "prof.", "vs.", "etc.", "jr.", "capt.", "col.", "gen.", "e.g.", "i.e.", "cf."};

bool is_space(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

bool may_end_sentence(std::string_view word) {
  while (!word.empty() && std::string_view("\"')]}").find(word.back()) != std::string_view::npos) word.remove_suffix(1);
  if (word.empty() || std::string_view(".?!").find(word.back()) == std::string_view::npos) return false;
  if (word.back() != '.') return true;
  while (!word.empty() && std::string_view("\"'([{").find(word.front()) != std::string_view::npos)
    word.remove_prefix(1);
  if (word.size() == 2 && std::isupper(static_cast<unsigned char>(word[0])) != 0 && word[0] != 'I') return false;
  std::string lower(word);
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return std::find(kAbbreviations.begin(), kAbbreviations.end(), lower) == kAbbreviations.end();
}

}  // namespace

Result<Prose> Prose::load(const std::filesystem::path& path) {
  CA_ASSIGN_OR_RETURN(std::string text, read_text_file(path));
  return parse(std::move(text), path.string());
}

Result<Prose> Prose::parse(std::string text, std::string_view name) {
  if (text.size() > std::numeric_limits<std::uint32_t>::max()) {
    return invalid_argument(fmt::format("{}: {} bytes of prose\n  allowed: less than 4 GiB", name, text.size()));
  }
  Prose prose;
  prose.text_ = std::move(text);
  prose.digest_ = hex_digest(fnv1a64(prose.text_));
  const std::string& bytes = prose.text_;
  for (std::size_t begin = 0; begin < bytes.size();) {
    if (is_space(bytes[begin])) {
      ++begin;
      continue;
    }
    std::size_t end = begin;
    while (end < bytes.size() && !is_space(bytes[end])) ++end;
    prose.words_.push_back({static_cast<std::uint32_t>(begin), static_cast<std::uint32_t>(end - begin), false});
    begin = end;
  }
  if (prose.words_.size() < kFewestWords) {
    return invalid_argument(
        fmt::format("{}: {} words of prose\n  allowed: {} or more", name, prose.words_.size(), kFewestWords));
  }
  for (std::int64_t i = 0; i < prose.num_words(); ++i) {
    const bool next_is_lower = std::islower(static_cast<unsigned char>(prose.word(i + 1).front())) != 0;
    prose.words_[static_cast<std::size_t>(i)].ends_sentence = may_end_sentence(prose.word(i)) && !next_is_lower;
  }
  return prose;
}

std::string_view Prose::word(std::int64_t i) const noexcept {
  const Word& word = words_[static_cast<std::size_t>(i % num_words())];
  return std::string_view(text_).substr(word.begin, word.length);
}

bool Prose::ends_sentence(std::int64_t i) const noexcept {
  return words_[static_cast<std::size_t>(i % num_words())].ends_sentence;
}

Result<WordList> WordList::load(const std::vector<std::filesystem::path>& paths) {
  if (paths.empty() || paths.size() > 2) {
    return invalid_argument(
        fmt::format("{} files of words\n  allowed: one, or two for first and second halves of keys", paths.size()));
  }
  WordList list;
  std::uint64_t digest = kFnvBasis;
  for (std::size_t i = 0; i < paths.size(); ++i) {
    CA_ASSIGN_OR_RETURN(const std::string text, read_text_file(paths[i]));
    digest = fnv1a64(text, digest);
    std::vector<std::string>& words = i == 0 ? list.first_ : list.second_;
    for (std::size_t begin = 0; begin < text.size();) {
      const std::size_t end = std::min(text.find('\n', begin), text.size());
      std::string_view line = std::string_view(text).substr(begin, end - begin);
      while (!line.empty() && is_space(line.back())) line.remove_suffix(1);
      while (!line.empty() && is_space(line.front())) line.remove_prefix(1);
      if (!line.empty()) words.emplace_back(line);
      begin = end + 1;
    }
    if (words.size() < kFewestWords) {
      return invalid_argument(fmt::format("{}: {} words\n  allowed: {} or more, one a line", paths[i].string(),
                                          words.size(), kFewestWords));
    }
    list.all_.insert(list.all_.end(), words.begin(), words.end());
  }
  std::sort(list.all_.begin(), list.all_.end());
  list.all_.erase(std::unique(list.all_.begin(), list.all_.end()), list.all_.end());
  list.digest_ = hex_digest(digest);
  return list;
}

}  // namespace compact::engine
