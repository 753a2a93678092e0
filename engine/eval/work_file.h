/// The file that collects what an evaluation finds: JSON lines after a header, one run after another can add to it.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "compact/status.h"

namespace compact::engine {

/// Everything that makes lines comparable: model, prompts, options. Tasks, lengths, samples, selectors and threads are
/// not in it: they may differ between the runs that a file collects.
struct EvalConfiguration {
  nlohmann::json json;
  [[nodiscard]] std::string digest() const;
};

/// What a line is about: the string under "kind", "answer" without one.
struct WorkLine {
  nlohmann::json json;
  std::string where;  // "FILE, line 3", for messages

  [[nodiscard]] bool is(const char* kind) const {
    const auto at = json.find("kind");
    return at == json.end() ? std::string_view(kind) == "answer" : *at == kind;
  }
};

struct WorkFileContents {
  EvalConfiguration configuration;
  std::vector<WorkLine> lines;
  std::uint64_t complete_bytes = 0;  // a last line without its end, left by a killed run, is not counted
};

/// Errors: kIoError for a file that is missing, not ours, or broken elsewhere than in its last line.
[[nodiscard]] Result<WorkFileContents> read_work_file(const std::filesystem::path& path);

/// Files of several runs or machines as one.
/// Errors: those of read_work_file; kInvalidArgument for two configurations (names what differs).
[[nodiscard]] Result<WorkFileContents> merge_work_files(const std::vector<std::filesystem::path>& paths);

/// Appends lines as they come, each written out before append() returns.
class WorkFile {
 public:
  /// A new file; with `resume`, one that an earlier run of the same configuration left, or a new one.
  /// Errors: kInvalidArgument if the file is there and `resume` is not set, or its configuration is another one (names
  /// what differs); those of read_work_file.
  [[nodiscard]] static Result<WorkFile> open(const std::filesystem::path& path, const EvalConfiguration& configuration,
                                             bool resume);

  [[nodiscard]] const std::vector<WorkLine>& resumed() const noexcept { return resumed_; }
  [[nodiscard]] Status append(const nlohmann::json& line);

 private:
  struct Closer {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  WorkFile() = default;

  std::string path_;
  std::unique_ptr<std::FILE, Closer> file_;
  std::vector<WorkLine> resumed_;
};

}  // namespace compact::engine
