/// Questions with documents, from the files of SQuAD 2.0 and HotpotQA.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "compact/status.h"

namespace compact::engine {

struct Question {
  std::string text;
  std::vector<std::string> answers;     // any of them is right
  std::vector<std::int32_t> documents;  // that it is asked about
  std::vector<std::int32_t> related;    // of the same article, the above aside
};

class QuestionSet {
 public:
  /// SQuAD 2.0 (an object with `data`; questions without an answer are left out) or HotpotQA with distractors (an array
  /// of objects with `question`, `answer`, `context`). Errors: kIoError naming the file and what is missing in it.
  [[nodiscard]] static Result<QuestionSet> load(const std::filesystem::path& path);
  [[nodiscard]] static Result<QuestionSet> parse(std::string_view json, std::string_view name);

  [[nodiscard]] const std::vector<Question>& questions() const noexcept { return questions_; }
  /// Each once, sorted by its bytes.
  [[nodiscard]] const std::vector<std::string>& documents() const noexcept { return documents_; }
  [[nodiscard]] const std::string& digest() const noexcept { return digest_; }

 private:
  std::vector<Question> questions_;
  std::vector<std::string> documents_;
  std::string digest_;
};

}  // namespace compact::engine
