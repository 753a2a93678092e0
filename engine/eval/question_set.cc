#include "engine/eval/question_set.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "engine/eval/digest.h"
#include "engine/loader/text_file.h"

namespace compact::engine {
namespace {

using Json = nlohmann::json;

// The place of a text in a sorted list that holds it.
std::int32_t place_of(const std::string& text, const std::vector<std::string>& sorted) {
  return static_cast<std::int32_t>(std::lower_bound(sorted.begin(), sorted.end(), text) - sorted.begin());
}

void sort_unique(std::vector<std::string>& texts) {
  std::sort(texts.begin(), texts.end());
  texts.erase(std::unique(texts.begin(), texts.end()), texts.end());
}

void read_squad(const Json& json, std::vector<Question>& questions, std::vector<std::string>& documents) {
  for (const Json& article : json.at("data")) {
    for (const Json& paragraph : article.at("paragraphs")) documents.push_back(paragraph.at("context"));
  }
  sort_unique(documents);
  for (const Json& article : json.at("data")) {
    std::vector<std::int32_t> of_article;
    for (const Json& paragraph : article.at("paragraphs")) {
      of_article.push_back(place_of(paragraph.at("context"), documents));
    }
    std::sort(of_article.begin(), of_article.end());
    of_article.erase(std::unique(of_article.begin(), of_article.end()), of_article.end());
    for (const Json& paragraph : article.at("paragraphs")) {
      const std::int32_t own = place_of(paragraph.at("context"), documents);
      for (const Json& entry : paragraph.at("qas")) {
        if (entry.value("is_impossible", false)) continue;
        Question question;
        question.text = entry.at("question");
        for (const Json& answer : entry.at("answers")) question.answers.push_back(answer.at("text"));
        question.documents = {own};
        for (const std::int32_t other : of_article) {
          if (other != own) question.related.push_back(other);
        }
        questions.push_back(std::move(question));
      }
    }
  }
}

// A document of HotpotQA: its title, then its sentences as they stand.
std::string hotpot_document(const Json& pair) {
  std::string text = pair.at(0).get<std::string>() + "\n";
  for (const Json& sentence : pair.at(1)) text += sentence.get_ref<const std::string&>();
  return text;
}

void read_hotpot(const Json& json, std::vector<Question>& questions, std::vector<std::string>& documents) {
  for (const Json& entry : json) {
    for (const Json& pair : entry.at("context")) documents.push_back(hotpot_document(pair));
  }
  sort_unique(documents);
  for (const Json& entry : json) {
    Question question;
    question.text = entry.at("question");
    question.answers = {entry.at("answer").get<std::string>()};
    for (const Json& pair : entry.at("context"))
      question.documents.push_back(place_of(hotpot_document(pair), documents));
    questions.push_back(std::move(question));
  }
}

}  // namespace

Result<QuestionSet> QuestionSet::load(const std::filesystem::path& path) {
  CA_ASSIGN_OR_RETURN(const std::string text, read_text_file(path));
  return parse(text, path.string());
}

Result<QuestionSet> QuestionSet::parse(std::string_view json_text, std::string_view name) {
  QuestionSet set;
  set.digest_ = hex_digest(fnv1a64(json_text));
  try {
    const Json json = Json::parse(json_text);
    if (json.is_object() && json.contains("data")) {
      read_squad(json, set.questions_, set.documents_);
    } else if (json.is_array()) {
      read_hotpot(json, set.questions_, set.documents_);
    } else {
      return io_error(fmt::format("{}: no set of questions\n  allowed: a file of SQuAD 2.0 or HotpotQA", name));
    }
  } catch (const Json::exception& error) {
    return io_error(fmt::format("{}: not as in SQuAD 2.0 or HotpotQA: {}", name, error.what()));
  }
  if (set.questions_.empty()) return io_error(fmt::format("{}: no question that has an answer", name));
  return set;
}

}  // namespace compact::engine
