/// Perplexity of a text, read in windows by chunked prefill, per range of positions.
///
/// A window is one prompt: every token but its first is predicted from those before it, with the selector in force in
/// every chunk. The same windows and chunks for all selectors, so their differences are the selectors' alone.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <tuple>
#include <vector>

#include "compact/status.h"
#include "compact/thread_pool.h"
#include "engine/eval/answerer.h"
#include "engine/eval/record.h"
#include "engine/eval/work_file.h"

namespace compact::engine {

/// Predicted tokens of the positions [begin, next begin), and minus the sum of their log probabilities.
struct NllBucket {
  std::int32_t begin = 0;
  std::int64_t tokens = 0;
  double nll = 0;
};

/// A window read with one selector.
struct PerplexityRecord : RunFigures {
  std::int32_t length_tokens = 0;
  std::int32_t window = 0;
  std::string selector;
  std::vector<NllBucket> buckets;  // ascending

  using Key = std::tuple<std::int32_t, std::int32_t, std::string>;
  [[nodiscard]] Key key() const { return {length_tokens, window, selector}; }
};

[[nodiscard]] nlohmann::json to_json(const PerplexityRecord& record);
/// The windows among the lines of work files. Errors: kIoError for a key that is missing or of another type, or a
/// window read twice.
[[nodiscard]] Result<std::vector<PerplexityRecord>> windows_of(const std::vector<WorkLine>& lines);

/// Where a position belongs: [0, first), [first, 2 first), [2 first, 4 first), ... Returns the range's begin.
[[nodiscard]] std::int32_t bucket_begin(std::int32_t position, std::int32_t first_tokens) noexcept;

/// Windows of exactly `length_tokens`, one after the other; each begins with what the tokenizer puts before a text.
/// Errors: kInvalidArgument for a length of less than 2 tokens beside those, and for a text too short for `count` of
/// them (says how many it is enough for).
[[nodiscard]] Result<std::vector<std::vector<std::int32_t>>> text_windows(const Tokenizer& tokenizer,
                                                                          std::string_view text,
                                                                          std::int32_t length_tokens,
                                                                          std::int32_t count);

/// -log softmax(row)[target], in fp64.
[[nodiscard]] double negative_log_likelihood(const float* row, std::int32_t vocab_size, std::int32_t target) noexcept;

using OnWindow = std::function<void(const PerplexityRecord& record)>;

struct PerplexityInput {
  const LoadedModel& model;
  const std::vector<std::vector<std::int32_t>>& windows;  // of one length
  Shard shard;
  std::int32_t first_bucket_tokens = 1024;
};

/// Reads every window of the shard with every selector, those aside that `records` has; appends to it and to the work
/// file (may be null). Errors: those of Session.
[[nodiscard]] Status measure_perplexity(const PerplexityInput& input, const std::vector<SelectorRun>& selectors,
                                        WorkFile* work, std::vector<PerplexityRecord>& records,
                                        const OnWindow& on_window, ThreadPool& pool);

}  // namespace compact::engine
