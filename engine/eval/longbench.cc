#include "engine/eval/longbench.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "engine/eval/digest.h"
#include "engine/loader/text_file.h"
#include "engine/model/stopwatch.h"

namespace compact::engine {
namespace {

using Json = nlohmann::json;

constexpr std::array<const char*, 4> kChoiceKeys = {"choice_A", "choice_B", "choice_C", "choice_D"};
constexpr std::array<const char*, 5> kClasses = {"easy", "hard", "short", "medium", "long"};
constexpr std::size_t kDifficulties = 2;  // of kClasses; the rest are lengths

Result<std::string> text_of(const Json& entry, const char* key, const std::string& where) {
  const auto at = entry.find(key);
  if (at == entry.end() || !at->is_string()) return io_error(fmt::format("{}: {} is no text", where, key));
  return at->get<std::string>();
}

Result<std::string> class_of(const Json& entry, const char* key, std::size_t first, std::size_t end,
                             const std::string& where) {
  CA_ASSIGN_OR_RETURN(std::string name, text_of(entry, key, where));
  std::string allowed;
  for (std::size_t i = first; i < end; ++i) {
    if (name == kClasses[i]) return name;
    allowed += (allowed.empty() ? "" : ", ") + std::string(kClasses[i]);
  }
  return io_error(fmt::format("{}: {} is '{}'\n  allowed: {}", where, key, name, allowed));
}

Result<LongBenchItem> read_item(const Json& entry, const std::string& where) {
  if (!entry.is_object()) return io_error(fmt::format("{}: no object", where));
  LongBenchItem item;
  CA_ASSIGN_OR_RETURN(item.id, text_of(entry, "_id", where));
  CA_ASSIGN_OR_RETURN(item.difficulty, class_of(entry, "difficulty", 0, kDifficulties, where));
  CA_ASSIGN_OR_RETURN(item.length_class, class_of(entry, "length", kDifficulties, kClasses.size(), where));
  CA_ASSIGN_OR_RETURN(item.question, text_of(entry, "question", where));
  for (std::size_t i = 0; i < kChoiceKeys.size(); ++i) {
    CA_ASSIGN_OR_RETURN(item.choices[i], text_of(entry, kChoiceKeys[i], where));
  }
  CA_ASSIGN_OR_RETURN(item.context, text_of(entry, "context", where));
  CA_ASSIGN_OR_RETURN(const std::string answer, text_of(entry, "answer", where));
  if (answer.size() != 1 || answer[0] < 'A' || answer[0] > 'D') {
    return io_error(fmt::format("{}: answer is '{}'\n  allowed: A, B, C, D", where, answer));
  }
  item.answer = answer[0];
  return item;
}

bool is_word_letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
         static_cast<unsigned char>(c) > 127;
}

}  // namespace

Result<LongBench> LongBench::load(const std::filesystem::path& path) {
  CA_ASSIGN_OR_RETURN(const std::string text, read_text_file(path));
  return parse(text, path.string());
}

Result<LongBench> LongBench::parse(std::string_view text, std::string_view name) {
  LongBench bench;
  bench.digest_ = hex_digest(fnv1a64(text));
  try {
    const Json json = Json::parse(text);
    if (!json.is_array() || json.empty()) {
      return io_error(fmt::format("{}: no list of questions\n  allowed: data.json of LongBench v2", name));
    }
    for (std::size_t i = 0; i < json.size(); ++i) {
      CA_ASSIGN_OR_RETURN(LongBenchItem item, read_item(json[i], fmt::format("{}, entry {}", name, i)));
      bench.items_.push_back(std::move(item));
    }
  } catch (const Json::exception& error) {
    return io_error(fmt::format("{}: not as in LongBench v2: {}", name, error.what()));
  }
  return bench;
}

std::string longbench_prompt(const LongBenchItem& item) {
  std::string prompt = fmt::format(
      "Below is a document, then a question about it with four choices, one of which is correct.\n\n"
      "<document>\n{}\n</document>\n\nQuestion: {}\n",
      item.context, item.question);
  for (std::size_t i = 0; i < item.choices.size(); ++i) {
    prompt += fmt::format("({}) {}\n", static_cast<char>('A' + i), item.choices[i]);
  }
  return prompt + "\nReply with this sentence and the letter of your choice in it: \"The correct answer is (letter)\".";
}

std::optional<char> longbench_letter(std::string_view output) {
  constexpr std::string_view kLead = "correct answer is";
  std::string plain;  // lower case, without emphasis
  for (const char c : output) {
    if (c != '*') plain += (c >= 'A' && c <= 'Z') ? static_cast<char>(c - 'A' + 'a') : c;
  }
  for (std::size_t at = plain.find(kLead); at != std::string::npos; at = plain.find(kLead, at + 1)) {
    std::size_t i = at + kLead.size();
    while (i < plain.size() && (plain[i] == ' ' || plain[i] == ':' || plain[i] == '\n')) ++i;
    const bool bracket = i < plain.size() && plain[i] == '(';
    if (bracket) ++i;
    if (i >= plain.size() || plain[i] < 'a' || plain[i] > 'd') continue;
    // A letter that goes on is a word; at the very end more may come.
    const bool ends = i + 1 < plain.size() ? !is_word_letter(plain[i + 1]) : bracket;
    if (ends) return static_cast<char>(plain[i] - 'a' + 'A');
  }
  return std::nullopt;
}

std::vector<std::int32_t> cut_middle(std::vector<std::int32_t> tokens, std::int32_t most_tokens) {
  const auto excess = static_cast<std::int64_t>(tokens.size()) - most_tokens;
  if (excess > 0) {
    const auto first = tokens.begin() + most_tokens / 2;
    tokens.erase(first, first + excess);
  }
  return tokens;
}

QuestionName longbench_name(const LongBenchItem& item, std::int32_t most_tokens, std::int32_t index) {
  return {item.difficulty + " " + item.length_class, most_tokens, index};
}

Result<EvalQuestion> longbench_question(const LoadedModel& model, const LongBenchItem& item, std::int32_t most_tokens) {
  EvalQuestion question;
  const Stopwatch stopwatch;
  CA_ASSIGN_OR_RETURN(std::vector<std::int32_t> tokens, encode_prompt(model, longbench_prompt(item)));
  question.encode_seconds = stopwatch.seconds();
  question.tokens = cut_middle(std::move(tokens), most_tokens);
  question.generate_tokens = kLongBenchAnswerTokens;
  question.answers = {std::string(1, item.answer)};
  question.score = [answer = item.answer](std::string_view output) {
    // "The correct answer is B": what ends the output ends the letter.
    return longbench_letter(std::string(output) + " ") == answer ? 1.0 : 0.0;
  };
  question.is_certain = [](std::string_view output) { return longbench_letter(output).has_value(); };
  return question;
}

std::vector<EvalRecord> by_longbench_class(const std::vector<EvalRecord>& records) {
  std::vector<EvalRecord> by_class = records;
  for (EvalRecord& record : by_class) record.task = "all";
  for (const char* name : kClasses) {
    for (const EvalRecord& record : records) {
      const std::size_t space = record.task.find(' ');
      if (record.task.substr(0, space) != name && record.task.substr(space + 1) != name) continue;
      by_class.push_back(record);
      by_class.back().task = name;
    }
  }
  return by_class;
}

}  // namespace compact::engine
