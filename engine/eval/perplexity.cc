#include "engine/eval/perplexity.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <utility>

#include "engine/model/stopwatch.h"
#include "engine/scheduler/session.h"

namespace compact::engine {
namespace {

using Json = nlohmann::json;

Result<PerplexityRecord> read_window(const PerplexityInput& input, std::span<const std::int32_t> tokens,
                                     const SelectorRun& selector, ThreadPool& pool) {
  const Model& transformer = *input.model.transformer;
  const ModelConfig& config = transformer.config();
  CA_ASSIGN_OR_RETURN(Session session, Session::create(transformer, std::ssize(tokens), 0, selector.options));
  PerplexityRecord record;
  const Stopwatch stopwatch;
  std::int32_t begin = 0;          // of the chunk
  std::vector<double> row_losses;  // [rows of the chunk]
  const auto on_chunk = [&](std::int32_t done, std::span<const float> logits) -> Status {
    // The last token of the window predicts what nobody has.
    const std::int32_t rows = std::min(done, static_cast<std::int32_t>(tokens.size()) - 1) - begin;
    row_losses.resize(static_cast<std::size_t>(std::max(rows, 0)));
    pool.parallel_for(std::ssize(row_losses), [&](std::int64_t row, std::int32_t) {
      row_losses[static_cast<std::size_t>(row)] =
          negative_log_likelihood(logits.data() + row * config.vocab_size, config.vocab_size,
                                  tokens[static_cast<std::size_t>(begin + row + 1)]);
    });
    for (std::int32_t row = 0; row < rows; ++row) {
      const std::int32_t bucket = bucket_begin(begin + row + 1, input.first_bucket_tokens);
      if (record.buckets.empty() || record.buckets.back().begin != bucket) record.buckets.push_back({bucket, 0, 0});
      ++record.buckets.back().tokens;
      record.buckets.back().nll += row_losses[static_cast<std::size_t>(row)];
    }
    begin = done;
    return {};
  };
  CA_RETURN_IF_ERROR(session.prefill(tokens, LogitsOf::kAllTokens, on_chunk, pool));
  record.ttft_seconds = stopwatch.seconds();
  record.prompt_tokens = static_cast<std::int32_t>(tokens.size());
  record.selector = selector.label;
  record.state_bytes_per_token = state_bytes_per_token(config, selector.options.kv_dtype, session.batch().kv_bytes(),
                                                       session.batch().summary_bytes());
  CA_ASSIGN_OR_RETURN(const std::vector<LayerReport> layers, session.batch().take_reports());
  record.add(layers);
  return record;
}

}  // namespace

Json to_json(const PerplexityRecord& record) {
  Json json = {{"kind", "window"},
               {"tokens", record.length_tokens},
               {"window", record.window},
               {"selector", record.selector},
               {"buckets", Json::array()}};
  for (const NllBucket& bucket : record.buckets) {
    json["buckets"].push_back({{"begin", bucket.begin}, {"tokens", bucket.tokens}, {"nll", bucket.nll}});
  }
  put_figures(record, json);
  return json;
}

Result<std::vector<PerplexityRecord>> windows_of(const std::vector<WorkLine>& lines) {
  std::vector<PerplexityRecord> records;
  std::set<PerplexityRecord::Key> keys;
  for (const WorkLine& line : lines) {
    if (!line.is("window")) continue;
    PerplexityRecord record;
    try {
      line.json.at("tokens").get_to(record.length_tokens);
      line.json.at("window").get_to(record.window);
      line.json.at("selector").get_to(record.selector);
      for (const Json& bucket : line.json.at("buckets")) {
        record.buckets.push_back({bucket.at("begin"), bucket.at("tokens"), bucket.at("nll")});
      }
      get_figures(line.json, record);
    } catch (const Json::exception& error) {
      return io_error(fmt::format("{}: not a window of compact eval perplexity: {}", line.where, error.what()));
    }
    if (!keys.insert(record.key()).second) {
      return io_error(fmt::format("{}: window {} of {} tokens with selector {} is read twice", line.where,
                                  record.window, record.length_tokens, record.selector));
    }
    records.push_back(std::move(record));
  }
  return records;
}

std::int32_t bucket_begin(std::int32_t position, std::int32_t first_tokens) noexcept {
  if (position < first_tokens) return 0;
  return first_tokens * static_cast<std::int32_t>(std::bit_floor(static_cast<std::uint32_t>(position / first_tokens)));
}

Result<std::vector<std::vector<std::int32_t>>> text_windows(const Tokenizer& tokenizer, std::string_view text,
                                                            std::int32_t length_tokens, std::int32_t count) {
  CA_ASSIGN_OR_RETURN(const std::vector<std::int32_t> before, tokenizer.encode("", true));
  CA_ASSIGN_OR_RETURN(const std::vector<std::int32_t> tokens, tokenizer.encode(text, false));
  const std::int64_t own = length_tokens - std::ssize(before);
  if (own < 2) {
    return invalid_argument(
        fmt::format("length is {} tokens\n  allowed: {} or more", length_tokens, before.size() + 2));
  }
  if (count < 1 || own * count > std::ssize(tokens)) {
    return invalid_argument(
        fmt::format("{} windows of {} tokens\n  allowed: 1 to {}: the text has {} tokens\n  try: a longer --text, or "
                    "fewer --samples",
                    count, length_tokens, std::ssize(tokens) / own, tokens.size()));
  }
  std::vector<std::vector<std::int32_t>> windows;
  for (std::int64_t i = 0; i < count; ++i) {
    std::vector<std::int32_t>& window = windows.emplace_back(before);
    window.insert(window.end(), tokens.begin() + i * own, tokens.begin() + (i + 1) * own);
  }
  return windows;
}

double negative_log_likelihood(const float* row, std::int32_t vocab_size, std::int32_t target) noexcept {
  const double largest = double{*std::max_element(row, row + vocab_size)};
  double sum = 0;
  for (std::int32_t i = 0; i < vocab_size; ++i) sum += std::exp(double{row[i]} - largest);
  return std::log(sum) + largest - double{row[target]};
}

Status measure_perplexity(const PerplexityInput& input, const std::vector<SelectorRun>& selectors, WorkFile* work,
                          std::vector<PerplexityRecord>& records, const OnWindow& on_window, ThreadPool& pool) {
  std::set<PerplexityRecord::Key> done;
  for (const PerplexityRecord& record : records) done.insert(record.key());
  const auto count = static_cast<std::int32_t>(input.windows.size());
  for (std::int32_t i = input.shard.index; i < count; i += input.shard.count) {
    const std::vector<std::int32_t>& window = input.windows[static_cast<std::size_t>(i)];
    const auto length_tokens = static_cast<std::int32_t>(window.size());
    for (const SelectorRun& selector : selectors) {
      if (done.contains({length_tokens, i, selector.label})) continue;
      CA_ASSIGN_OR_RETURN(PerplexityRecord record, read_window(input, window, selector, pool));
      record.length_tokens = length_tokens;
      record.window = i;
      if (work != nullptr) CA_RETURN_IF_ERROR(work->append(to_json(record)));
      if (on_window) on_window(record);
      records.push_back(std::move(record));
    }
  }
  return {};
}

}  // namespace compact::engine
