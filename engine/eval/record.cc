#include "engine/eval/record.h"

#include <fmt/format.h>
#include <sys/file.h>

#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include "engine/cli/files.h"
#include "engine/eval/digest.h"
#include "engine/loader/json.h"

namespace compact::engine {
namespace {

using Json = nlohmann::json;

constexpr const char* kFormat = "compact eval 1";

// Bytes that are no UTF-8 cannot stand in JSON.
std::string dumped(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

// "model.digest is a, here b": the first difference between two configurations.
std::string first_difference(const Json& old_json, const Json& new_json, const std::string& path = "") {
  if (old_json.is_object() && new_json.is_object()) {
    for (const auto& [key, value] : new_json.items()) {
      const std::string name = path.empty() ? key : path + "." + key;
      if (!old_json.contains(key)) return fmt::format("{} is not set there, here {}", name, shown(value));
      if (old_json[key] != value) return first_difference(old_json[key], value, name);
    }
    for (const auto& [key, value] : old_json.items()) {
      const std::string name = path.empty() ? key : path + "." + key;
      if (!new_json.contains(key)) return fmt::format("{} is {} there, here not set", name, shown(value));
    }
  }
  return fmt::format("{} is {} there, here {}", path, shown(old_json), shown(new_json));
}

Status refuse_twice(const EvalRecord& record, const std::string& where) {
  return io_error(fmt::format("{}: sample {} of {} at {} tokens with selector {} is answered twice", where,
                              record.index, record.task, record.length_tokens, record.selector));
}

}  // namespace

Json to_json(const EvalRecord& record) {
  return {{"task", record.task},
          {"tokens", record.length_tokens},
          {"sample", record.index},
          {"selector", record.selector},
          {"score", record.score},
          {"answers", record.answers},
          {"output", record.output},
          {"prompt_tokens", record.prompt_tokens},
          {"generated_tokens", record.generated_tokens},
          {"ttft_seconds", record.ttft_seconds},
          {"attention_seconds", record.attention_seconds},
          {"decode_seconds", record.decode_seconds},
          {"listed_row_pages", record.stats.listed_row_pages},
          {"wanted_row_pages", record.stats.wanted_row_pages},
          {"visible_row_pages", record.stats.visible_row_pages},
          {"dense_chunks", record.dense_chunks},
          {"nonfinite_rows", record.nonfinite_rows}};
}

Result<EvalRecord> record_from_json(const Json& json, const std::string& where) {
  EvalRecord record;
  try {
    json.at("task").get_to(record.task);
    json.at("tokens").get_to(record.length_tokens);
    json.at("sample").get_to(record.index);
    json.at("selector").get_to(record.selector);
    json.at("score").get_to(record.score);
    json.at("answers").get_to(record.answers);
    json.at("output").get_to(record.output);
    json.at("prompt_tokens").get_to(record.prompt_tokens);
    json.at("generated_tokens").get_to(record.generated_tokens);
    json.at("ttft_seconds").get_to(record.ttft_seconds);
    json.at("attention_seconds").get_to(record.attention_seconds);
    json.at("decode_seconds").get_to(record.decode_seconds);
    json.at("listed_row_pages").get_to(record.stats.listed_row_pages);
    json.at("wanted_row_pages").get_to(record.stats.wanted_row_pages);
    json.at("visible_row_pages").get_to(record.stats.visible_row_pages);
    json.at("dense_chunks").get_to(record.dense_chunks);
    json.at("nonfinite_rows").get_to(record.nonfinite_rows);
  } catch (const Json::exception& error) {
    return io_error(fmt::format("{}: not a record of compact eval: {}", where, error.what()));
  }
  return record;
}

std::string EvalConfiguration::digest() const { return hex_digest(fnv1a64(dumped(json))); }

Result<WorkFileContents> read_work_file(const std::filesystem::path& path) {
  CA_ASSIGN_OR_RETURN(const std::string text, read_text_file(path));
  WorkFileContents contents;
  std::set<EvalRecord::Key> keys;
  std::int64_t line = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = text.find('\n', begin);
    if (end == std::string::npos) break;  // the line that a killed run did not finish
    const std::string where = fmt::format("{}, line {}", path.string(), ++line);
    CA_ASSIGN_OR_RETURN(const Json json, parse_json_object(std::string_view(text).substr(begin, end - begin), where));
    if (line == 1) {
      if (!json.contains("format") || json["format"] != kFormat || !json.contains("configuration")) {
        return io_error(fmt::format("{}: not a work file of this version\n  allowed: a file that begins with {}", where,
                                    dumped({{"format", kFormat}})));
      }
      contents.configuration.json = json["configuration"];
    } else {
      CA_ASSIGN_OR_RETURN(EvalRecord record, record_from_json(json, where));
      if (!keys.insert(record.key()).second) return refuse_twice(record, where);
      contents.records.push_back(std::move(record));
    }
    begin = end + 1;
    contents.complete_bytes = begin;
  }
  if (line == 0) return io_error(fmt::format("{}: no complete line\n  try: delete it", path.string()));
  return contents;
}

Result<WorkFileContents> merge_work_files(const std::vector<std::filesystem::path>& paths) {
  WorkFileContents all;
  std::set<EvalRecord::Key> keys;
  for (const std::filesystem::path& path : paths) {
    CA_ASSIGN_OR_RETURN(WorkFileContents part, read_work_file(path));
    if (&path == &paths.front()) {
      all.configuration = part.configuration;
    } else if (part.configuration.json != all.configuration.json) {
      return invalid_argument(fmt::format("{} and {} are runs of different configurations: {}", paths.front().string(),
                                          path.string(),
                                          first_difference(all.configuration.json, part.configuration.json)));
    }
    for (EvalRecord& record : part.records) {
      if (!keys.insert(record.key()).second) return refuse_twice(record, path.string());
      all.records.push_back(std::move(record));
    }
  }
  return all;
}

Result<WorkFile> WorkFile::open(const std::filesystem::path& path, const EvalConfiguration& configuration,
                                bool resume) {
  WorkFile work;
  work.path_ = path.string();
  std::error_code error;
  const bool is_there = std::filesystem::exists(path, error);
  if (is_there && !resume) {
    return invalid_argument(fmt::format("{} exists\n  try: --resume to go on with it, or another file", path.string()));
  }
  if (is_there) {
    CA_ASSIGN_OR_RETURN(WorkFileContents contents, read_work_file(path));
    if (contents.configuration.json != configuration.json) {
      return invalid_argument(
          fmt::format("{} was made with another configuration: {}\n  try: another file, or the same "
                      "options",
                      path.string(), first_difference(contents.configuration.json, configuration.json)));
    }
    std::filesystem::resize_file(path, contents.complete_bytes, error);
    if (error) return io_error(fmt::format("cannot write {}: {}", path.string(), error.message()));
    work.resumed_ = std::move(contents.records);
  }
  work.file_.reset(std::fopen(path.c_str(), "ab"));
  if (work.file_ == nullptr) return io_error(fmt::format("cannot write {}: {}", path.string(), std::strerror(errno)));
  if (flock(fileno(work.file_.get()), LOCK_EX | LOCK_NB) != 0) {
    return io_error(fmt::format("{} is in use by another run\n  try: another file for each --shard", path.string()));
  }
  if (!is_there) {
    CA_RETURN_IF_ERROR(work.write_line(
        {{"format", kFormat}, {"digest", configuration.digest()}, {"configuration", configuration.json}}));
  }
  return work;
}

Status WorkFile::append(const EvalRecord& record) { return write_line(to_json(record)); }

Status WorkFile::write_line(const Json& json) {
  const std::string line = dumped(json) + "\n";
  const bool written = std::fwrite(line.data(), 1, line.size(), file_.get()) == line.size();
  if (written && std::fflush(file_.get()) == 0) return {};
  return io_error(fmt::format("cannot write {}: {}", path_, std::strerror(errno)));
}

}  // namespace compact::engine
