#include "engine/report/perplexity_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "engine/report/run_report.h"

namespace compact::engine {
namespace {

double mean_loss(const NllBucket& bucket) {
  return bucket.tokens > 0 ? bucket.nll / static_cast<double>(bucket.tokens) : 0;
}

NllBucket sum_of(const std::vector<NllBucket>& buckets) {
  NllBucket all;
  for (const NllBucket& bucket : buckets) {
    all.tokens += bucket.tokens;
    all.nll += bucket.nll;
  }
  return all;
}

PerplexityRow make_row(const std::vector<const PerplexityRecord*>& records,
                       const std::map<std::int32_t, const PerplexityRecord*>& dense) {
  PerplexityRow row;
  std::map<std::int32_t, NllBucket> buckets;
  NllBucket own;  // of the windows that dense has read too
  NllBucket of_dense;
  std::int64_t steps = 0;
  for (const PerplexityRecord* record : records) {
    row.length_tokens = record->length_tokens;
    row.selector = record->selector;
    for (const NllBucket& bucket : record->buckets) {
      NllBucket& sum = buckets[bucket.begin];
      sum.begin = bucket.begin;
      sum.tokens += bucket.tokens;
      sum.nll += bucket.nll;
    }
    if (const auto same = dense.find(record->window); same != dense.end()) {
      own = sum_of({own, sum_of(record->buckets)});
      of_dense = sum_of({of_dense, sum_of(same->second->buckets)});
    }
    row.stats.add(record->stats);
    row.attention_seconds += record->attention_seconds;
    steps += record->steps;
  }
  for (const auto& [begin, bucket] : buckets) row.buckets.push_back(bucket);
  row.all = sum_of(row.buckets);
  row.windows = static_cast<std::int32_t>(records.size());
  if (of_dense.tokens > 0) row.ratio_to_dense = std::exp(mean_loss(own) - mean_loss(of_dense));
  if (steps > 0) row.step_seconds = row.attention_seconds / static_cast<double>(steps);
  row.attention_seconds /= static_cast<double>(row.windows);
  return row;
}

std::string value_of(const nlohmann::json& json, const char* key) {
  return json.contains(key) ? json[key].get<std::string>() : "not said";
}

}  // namespace

std::vector<PerplexityRow> perplexity_rows(const std::vector<PerplexityRecord>& records) {
  std::set<std::int32_t> lengths;
  std::vector<std::string> selectors;
  std::map<std::pair<std::int32_t, std::string>, std::vector<const PerplexityRecord*>> groups;
  std::map<std::int32_t, std::map<std::int32_t, const PerplexityRecord*>> dense;  // [length][window]
  for (const PerplexityRecord& record : records) {
    lengths.insert(record.length_tokens);
    if (std::find(selectors.begin(), selectors.end(), record.selector) == selectors.end()) {
      selectors.push_back(record.selector);
    }
    groups[{record.length_tokens, record.selector}].push_back(&record);
    if (record.selector == "dense") dense[record.length_tokens][record.window] = &record;
  }
  std::vector<PerplexityRow> rows;
  for (const std::int32_t length : lengths) {
    for (const std::string& selector : selectors) {
      const auto group = groups.find({length, selector});
      if (group == groups.end()) continue;
      // In order of windows, so that sums do not depend on the order in which shards were merged.
      std::sort(group->second.begin(), group->second.end(),
                [](const PerplexityRecord* a, const PerplexityRecord* b) { return a->window < b->window; });
      rows.push_back(make_row(group->second, dense[length]));
    }
  }
  return rows;
}

nlohmann::json perplexity_json(const EvalConfiguration& configuration, const std::vector<PerplexityRow>& rows) {
  nlohmann::json json = {
      {"configuration", configuration.json}, {"digest", configuration.digest()}, {"rows", nlohmann::json::array()}};
  for (const PerplexityRow& row : rows) {
    nlohmann::json of_row = {{"tokens", row.length_tokens},
                             {"selector", row.selector},
                             {"windows", row.windows},
                             {"predicted_tokens", row.all.tokens},
                             {"perplexity", std::exp(mean_loss(row.all))},
                             {"density", row.stats.density()},
                             {"union_inflation", row.stats.union_inflation()},
                             {"attention_seconds", row.attention_seconds},
                             {"step_seconds", row.step_seconds},
                             {"buckets", nlohmann::json::array()}};
    if (row.ratio_to_dense > 0) of_row["ratio_to_dense"] = row.ratio_to_dense;
    for (const NllBucket& bucket : row.buckets) {
      of_row["buckets"].push_back(
          {{"begin", bucket.begin}, {"tokens", bucket.tokens}, {"perplexity", std::exp(mean_loss(bucket))}});
    }
    json["rows"].push_back(std::move(of_row));
  }
  return json;
}

std::string perplexity_markdown(const EvalConfiguration& configuration, const std::vector<PerplexityRow>& rows) {
  std::set<std::int32_t> begins;
  for (const PerplexityRow& row : rows) {
    for (const NllBucket& bucket : row.buckets) begins.insert(bucket.begin);
  }
  std::string text = fmt::format(
      "Perplexity: model {}, text {}, configuration {}\n\n"
      "| tokens | selector | windows | perplexity | / dense | density | union inflation | step ms |",
      value_of(configuration.json, "model"), value_of(configuration.json, "text"), configuration.digest());
  std::string rule = "\n|---|---|---|---|---|---|---|---|";
  for (const std::int32_t begin : begins) {
    text += fmt::format(" from {} |", with_thousands(begin));
    rule += "---|";
  }
  text += rule + "\n";
  for (const PerplexityRow& row : rows) {
    text += fmt::format("| {} | {} | {} | {:.4f} | {} | {:.3f} | {:.2f} | {:.2f} |", with_thousands(row.length_tokens),
                        row.selector, row.windows, std::exp(mean_loss(row.all)),
                        row.ratio_to_dense > 0 ? fmt::format("{:.4f}", row.ratio_to_dense) : std::string(),
                        row.stats.density(), row.stats.union_inflation(), 1e3 * row.step_seconds);
    for (const std::int32_t begin : begins) {
      const auto bucket = std::find_if(row.buckets.begin(), row.buckets.end(),
                                       [begin](const NllBucket& b) { return b.begin == begin; });
      text += bucket == row.buckets.end() ? " |" : fmt::format(" {:.4f} |", std::exp(mean_loss(*bucket)));
    }
    text += "\n";
  }
  return text;
}

}  // namespace compact::engine
