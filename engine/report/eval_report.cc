#include "engine/report/eval_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <utility>

#include "engine/report/run_report.h"

namespace compact::engine {
namespace {

constexpr const char* kBaseline = "dense";

// Adds a value to a list unless it is there.
template <class T>
void add_once(std::vector<T>& values, const T& value) {
  if (std::find(values.begin(), values.end(), value) == values.end()) values.push_back(value);
}

EvalRow make_row(std::span<const EvalRecord* const> records, const std::map<std::int32_t, double>& dense_scores) {
  EvalRow row;
  std::vector<double> scores;
  std::vector<double> differences;
  std::int64_t steps = 0;
  for (const EvalRecord* record : records) {
    row.task = record->task;
    row.length_tokens = record->length_tokens;
    row.selector = record->selector;
    scores.push_back(record->score);
    const auto dense = dense_scores.find(record->index);
    if (record->selector != kBaseline && dense != dense_scores.end()) {
      differences.push_back(record->score - dense->second);
    }
    row.stats.add(record->stats);
    row.ttft_seconds += record->ttft_seconds;
    row.attention_seconds += record->attention_seconds;
    row.select_seconds += record->select_seconds;
    row.state_bytes_per_token += record->state_bytes_per_token;
    steps += record->steps;
    row.prompt_tokens += record->prompt_tokens;
    row.dense_chunks += record->dense_chunks;
    row.nonfinite_rows += record->nonfinite_rows;
  }
  const auto count = static_cast<double>(records.size());
  row.samples = static_cast<std::int32_t>(records.size());
  if (steps > 0) {
    row.step_seconds = row.attention_seconds / static_cast<double>(steps);
    row.select_seconds /= static_cast<double>(steps);
  }
  row.state_bytes_per_token /= count;
  row.ttft_seconds /= count;
  row.attention_seconds /= count;
  row.prompt_tokens /= count;
  row.accuracy = score_interval(scores);
  row.pairs = static_cast<std::int32_t>(differences.size());
  if (!differences.empty()) row.difference = difference_interval(differences);
  return row;
}

EvalRow mean_row(std::span<const EvalRow> rows) {
  EvalRow mean;
  std::vector<Interval> accuracies;
  std::vector<Interval> differences;
  for (const EvalRow& row : rows) {
    mean.length_tokens = row.length_tokens;
    mean.selector = row.selector;
    mean.samples += row.samples;
    mean.pairs += row.pairs;
    accuracies.push_back(row.accuracy);
    if (row.difference) differences.push_back(*row.difference);
    mean.stats.add(row.stats);
    mean.ttft_seconds += row.ttft_seconds;
    mean.attention_seconds += row.attention_seconds;
    mean.step_seconds += row.step_seconds;
    mean.select_seconds += row.select_seconds;
    mean.state_bytes_per_token += row.state_bytes_per_token;
    mean.prompt_tokens += row.prompt_tokens;
    mean.dense_chunks += row.dense_chunks;
    mean.nonfinite_rows += row.nonfinite_rows;
  }
  const auto count = static_cast<double>(rows.size());
  mean.task = fmt::format("mean of {} tasks", rows.size());
  mean.ttft_seconds /= count;
  mean.attention_seconds /= count;
  mean.step_seconds /= count;
  mean.select_seconds /= count;
  mean.state_bytes_per_token /= count;
  mean.prompt_tokens /= count;
  mean.accuracy = mean_of(accuracies);
  if (differences.size() == rows.size()) mean.difference = mean_of(differences);
  return mean;
}

nlohmann::json row_json(const EvalRow& row) {
  nlohmann::json json = {{"task", row.task},
                         {"tokens", row.length_tokens},
                         {"samples", row.samples},
                         {"selector", row.selector},
                         {"accuracy", 100 * row.accuracy.mean},
                         {"accuracy_low", 100 * row.accuracy.low},
                         {"accuracy_high", 100 * row.accuracy.high},
                         {"density", row.stats.density()},
                         {"union_inflation", row.stats.union_inflation()},
                         {"ttft_seconds", row.ttft_seconds},
                         {"attention_seconds", row.attention_seconds},
                         {"step_seconds", row.step_seconds},
                         {"select_seconds", row.select_seconds},
                         {"state_bytes_per_token", row.state_bytes_per_token},
                         {"prompt_tokens", row.prompt_tokens},
                         {"dense_chunks", row.dense_chunks},
                         {"nonfinite_rows", row.nonfinite_rows}};
  if (row.difference) {
    json["difference"] = 100 * row.difference->mean;
    json["difference_low"] = 100 * row.difference->low;
    json["difference_high"] = 100 * row.difference->high;
    json["pairs"] = row.pairs;
  }
  return json;
}

// What the figures are of: the parts of a configuration that a reader may know.
std::string title_of(const EvalConfiguration& configuration) {
  const nlohmann::json& json = configuration.json;
  std::string title = json.value("form", std::string("compact eval"));
  const char* separator = ": ";
  for (const char* key : {"model", "data", "essays", "words", "final_chunk"}) {
    if (!json.contains(key)) continue;
    const nlohmann::json& value = json[key];
    title += fmt::format("{}{} {}", separator, key, value.is_string() ? value.get<std::string>() : value.dump());
    separator = ", ";
  }
  return title + ", configuration " + configuration.digest();
}

}  // namespace

std::vector<EvalRow> eval_rows(const std::vector<EvalRecord>& records, MeanRows means) {
  std::vector<std::int32_t> lengths;
  std::vector<std::string> tasks;
  std::vector<std::string> selectors;
  std::map<std::tuple<std::int32_t, std::string, std::string>, std::vector<const EvalRecord*>> groups;
  std::map<std::pair<std::int32_t, std::string>, std::map<std::int32_t, double>> dense_scores;  // by sample
  for (const EvalRecord& record : records) {
    add_once(lengths, record.length_tokens);
    add_once(tasks, record.task);
    add_once(selectors, record.selector);
    groups[{record.length_tokens, record.task, record.selector}].push_back(&record);
    if (record.selector == kBaseline) dense_scores[{record.length_tokens, record.task}][record.index] = record.score;
  }
  std::sort(lengths.begin(), lengths.end());
  std::vector<EvalRow> rows;
  for (const std::int32_t length : lengths) {
    std::map<std::string, std::vector<EvalRow>> by_selector;
    for (const std::string& task : tasks) {
      for (const std::string& selector : selectors) {
        auto group = groups.find({length, task, selector});
        if (group == groups.end()) continue;
        // In order of samples, so that sums do not depend on the order in which shards were merged.
        std::sort(group->second.begin(), group->second.end(),
                  [](const EvalRecord* a, const EvalRecord* b) { return a->index < b->index; });
        rows.push_back(make_row(group->second, dense_scores[{length, task}]));
        by_selector[selector].push_back(rows.back());
      }
    }
    for (const std::string& selector : selectors) {
      if (means == MeanRows::kOverTasks && by_selector[selector].size() > 1)
        rows.push_back(mean_row(by_selector[selector]));
    }
  }
  return rows;
}

nlohmann::json eval_json(const EvalConfiguration& configuration, const std::vector<EvalRow>& rows) {
  nlohmann::json json = {
      {"configuration", configuration.json}, {"digest", configuration.digest()}, {"rows", nlohmann::json::array()}};
  for (const EvalRow& row : rows) json["rows"].push_back(row_json(row));
  return json;
}

std::string eval_markdown(const EvalConfiguration& configuration, const std::vector<EvalRow>& rows) {
  std::string text = title_of(configuration) + "\n\n";
  text +=
      "| tokens | task | selector | samples | accuracy | to dense, points [95 %] | density | union inflation | TTFT s "
      "| "
      "attention s |\n|---|---|---|---|---|---|---|---|---|---|\n";
  for (const EvalRow& row : rows) {
    const std::string difference = row.difference
                                       ? fmt::format("{:+.1f} [{:+.1f}, {:+.1f}]", 100 * row.difference->mean,
                                                     100 * row.difference->low, 100 * row.difference->high)
                                       : std::string();
    text += fmt::format("| {} | {} | {} | {} | {:.1f} | {} | {:.3f} | {:.2f} | {:.2f} | {:.2f} |\n",
                        with_thousands(row.length_tokens), row.task, row.selector, row.samples, 100 * row.accuracy.mean,
                        difference, row.stats.density(), row.stats.union_inflation(), row.ttft_seconds,
                        row.attention_seconds);
  }
  return text;
}

}  // namespace compact::engine
