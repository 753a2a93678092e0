#include "engine/eval/work_file.h"

#include <fmt/format.h>
#include <sys/file.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <string_view>
#include <system_error>
#include <utility>

#include "engine/eval/digest.h"
#include "engine/loader/json.h"
#include "engine/loader/text_file.h"

namespace compact::engine {
namespace {

using Json = nlohmann::json;

constexpr const char* kFormat = "compact eval 2";

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

}  // namespace

std::string EvalConfiguration::digest() const { return hex_digest(fnv1a64(dumped(json))); }

Result<WorkFileContents> read_work_file(const std::filesystem::path& path) {
  CA_ASSIGN_OR_RETURN(const std::string text, read_text_file(path));
  WorkFileContents contents;
  std::int64_t line = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = text.find('\n', begin);
    if (end == std::string::npos) break;  // the line that a killed run did not finish
    std::string where = fmt::format("{}, line {}", path.string(), ++line);
    CA_ASSIGN_OR_RETURN(Json json, parse_json_object(std::string_view(text).substr(begin, end - begin), where));
    if (line == 1) {
      if (!json.contains("format") || json["format"] != kFormat || !json.contains("configuration")) {
        return io_error(fmt::format("{}: not a work file of this version\n  allowed: a file that begins with {}", where,
                                    dumped({{"format", kFormat}})));
      }
      contents.configuration.json = json["configuration"];
    } else {
      contents.lines.push_back({std::move(json), std::move(where)});
    }
    begin = end + 1;
    contents.complete_bytes = begin;
  }
  if (line == 0) return io_error(fmt::format("{}: no complete line\n  try: delete it", path.string()));
  return contents;
}

Result<WorkFileContents> merge_work_files(const std::vector<std::filesystem::path>& paths) {
  WorkFileContents all;
  for (const std::filesystem::path& path : paths) {
    CA_ASSIGN_OR_RETURN(WorkFileContents part, read_work_file(path));
    if (&path == &paths.front()) {
      all.configuration = part.configuration;
    } else if (part.configuration.json != all.configuration.json) {
      return invalid_argument(fmt::format("{} and {} are runs of different configurations: {}", paths.front().string(),
                                          path.string(),
                                          first_difference(all.configuration.json, part.configuration.json)));
    }
    std::move(part.lines.begin(), part.lines.end(), std::back_inserter(all.lines));
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
    work.resumed_ = std::move(contents.lines);
  }
  work.file_.reset(std::fopen(path.c_str(), "ab"));
  if (work.file_ == nullptr) return io_error(fmt::format("cannot write {}: {}", path.string(), std::strerror(errno)));
  if (flock(fileno(work.file_.get()), LOCK_EX | LOCK_NB) != 0) {
    return io_error(fmt::format("{} is in use by another run\n  try: another file for each --shard", path.string()));
  }
  if (!is_there) {
    CA_RETURN_IF_ERROR(
        work.append({{"format", kFormat}, {"digest", configuration.digest()}, {"configuration", configuration.json}}));
  }
  return work;
}

Status WorkFile::append(const Json& json) {
  const std::string line = dumped(json) + "\n";
  const bool written = std::fwrite(line.data(), 1, line.size(), file_.get()) == line.size();
  if (written && std::fflush(file_.get()) == 0) return {};
  return io_error(fmt::format("cannot write {}: {}", path_, std::strerror(errno)));
}

}  // namespace compact::engine
