/// One answered sample, and the file that collects them: JSON lines, one run after another can add to it.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "compact/block_union.h"
#include "compact/status.h"

namespace compact::engine {

/// A sample answered with one selector.
struct EvalRecord {
  std::string task;
  std::int32_t length_tokens = 0;
  std::int32_t index = 0;
  std::string selector;  // as the user wrote it, flags of its own included
  double score = 0;      // 0 to 1
  std::vector<std::string> answers;
  std::string output;
  std::int32_t prompt_tokens = 0;
  std::int32_t generated_tokens = 0;
  double ttft_seconds = 0;
  double attention_seconds = 0;  // select + unite + attend, over the layers of the prefill
  double decode_seconds = 0;
  UnionStats stats;               // over the layers of the prefill
  std::int64_t dense_chunks = 0;  // chunks x layers that ran dense by decision, first chunks aside
  std::int64_t nonfinite_rows = 0;

  /// What makes two records the same question to the same selector.
  using Key = std::tuple<std::string, std::int32_t, std::int32_t, std::string>;
  [[nodiscard]] Key key() const { return {task, length_tokens, index, selector}; }
};

[[nodiscard]] nlohmann::json to_json(const EvalRecord& record);
/// Errors: kIoError naming `where` and the key that is missing or of another type.
[[nodiscard]] Result<EvalRecord> record_from_json(const nlohmann::json& json, const std::string& where);

/// Everything that makes records comparable: model, prompts, options. Tasks, lengths, samples, selectors and threads
/// are not in it: they may differ between the runs that a file collects.
struct EvalConfiguration {
  nlohmann::json json;
  [[nodiscard]] std::string digest() const;
};

struct WorkFileContents {
  EvalConfiguration configuration;
  std::vector<EvalRecord> records;
  std::uint64_t complete_bytes = 0;  // a last line without its end, left by a killed run, is not counted
};

/// Errors: kIoError for a file that is missing, not ours, or broken elsewhere than in its last line; a question
/// answered twice.
[[nodiscard]] Result<WorkFileContents> read_work_file(const std::filesystem::path& path);

/// Files of several runs or machines as one.
/// Errors: those of read_work_file; kInvalidArgument for two configurations (names what differs) or a question answered
/// twice.
[[nodiscard]] Result<WorkFileContents> merge_work_files(const std::vector<std::filesystem::path>& paths);

/// Appends records as they come, each written out before append() returns.
class WorkFile {
 public:
  /// A new file; with `resume`, one that an earlier run of the same configuration left, or a new one.
  /// Errors: kInvalidArgument if the file is there and `resume` is not set, or its configuration is another one (names
  /// what differs); those of read_work_file.
  [[nodiscard]] static Result<WorkFile> open(const std::filesystem::path& path, const EvalConfiguration& configuration,
                                             bool resume);

  [[nodiscard]] const std::vector<EvalRecord>& resumed() const noexcept { return resumed_; }
  [[nodiscard]] Status append(const EvalRecord& record);

 private:
  struct Closer {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  WorkFile() = default;
  [[nodiscard]] Status write_line(const nlohmann::json& json);

  std::string path_;
  std::unique_ptr<std::FILE, Closer> file_;
  std::vector<EvalRecord> resumed_;
};

}  // namespace compact::engine
