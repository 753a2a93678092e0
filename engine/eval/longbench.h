/// LongBench v2 (arXiv 2412.15204): multiple choice over long documents, from the benchmark's own file.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "compact/status.h"
#include "engine/eval/answerer.h"

namespace compact::engine {

struct LongBenchItem {
  std::string id;
  std::string difficulty;    // easy, hard
  std::string length_class;  // short, medium, long
  std::string question;
  std::array<std::string, 4> choices;  // A to D
  char answer = 'A';
  std::string context;
};

class LongBench {
 public:
  /// The benchmark's data.json: an array of objects with _id, difficulty, length, question, choice_A to choice_D,
  /// answer, context. Errors: kIoError naming the file, the entry and what is missing or wrong in it.
  [[nodiscard]] static Result<LongBench> load(const std::filesystem::path& path);
  [[nodiscard]] static Result<LongBench> parse(std::string_view json, std::string_view name);

  [[nodiscard]] const std::vector<LongBenchItem>& items() const noexcept { return items_; }
  [[nodiscard]] const std::string& digest() const noexcept { return digest_; }

 private:
  std::vector<LongBenchItem> items_;
  std::string digest_;
};

/// Tokens that an answer may take.
inline constexpr std::int32_t kLongBenchAnswerTokens = 128;

/// The user's turn: the document, the question, its four choices, and the form that the answer is to have. The wording
/// is ours.
[[nodiscard]] std::string longbench_prompt(const LongBenchItem& item);

/// The letter that the output names as the correct answer; nothing while it has named none. Emphasis (asterisks), case
/// and brackets do not matter; "the correct answer is about" names none.
[[nodiscard]] std::optional<char> longbench_letter(std::string_view output);

/// A prompt that fits: of one that is too long the middle is left out, as the benchmark does, so that its beginning and
/// the question at its end stay.
[[nodiscard]] std::vector<std::int32_t> cut_middle(std::vector<std::int32_t> tokens, std::int32_t most_tokens);

/// Records of one item each: task is its classes, e.g. "hard short".
[[nodiscard]] QuestionName longbench_name(const LongBenchItem& item, std::int32_t most_tokens, std::int32_t index);

/// Errors: those of the tokenizer and of the chat format.
[[nodiscard]] Result<EvalQuestion> longbench_question(const LoadedModel& model, const LongBenchItem& item,
                                                      std::int32_t most_tokens);

/// Every record once under "all", once under its difficulty and once under its length class, for a table by class.
[[nodiscard]] std::vector<EvalRecord> by_longbench_class(const std::vector<EvalRecord>& records);

}  // namespace compact::engine
