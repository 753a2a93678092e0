#include "engine/report/compare_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "engine/report/run_report.h"

namespace compact::engine {
namespace {

constexpr const char* kDense = "dense";

std::string difference_text(const EvalRow& row) {
  if (!row.difference) return {};
  return fmt::format("{:+.1f} [{:+.1f}, {:+.1f}]", 100 * row.difference->mean, 100 * row.difference->low,
                     100 * row.difference->high);
}

std::string bytes_text(double bytes) {
  return bytes < 10 ? fmt::format("{:.1f}", bytes) : fmt::format("{:.0f}", bytes);
}

nlohmann::json row_json(const CompareRow& row) {
  nlohmann::json json = to_json(row.setting);
  json.erase("kind");
  json["fitted_density"] = row.setting.density;
  json["density"] = row.density();
  json["union_inflation"] = row.union_inflation();
  if (!row.mean) return json;
  const EvalRow& mean = *row.mean;
  json.update({{"samples", mean.samples},
               {"accuracy", 100 * mean.accuracy.mean},
               {"accuracy_low", 100 * mean.accuracy.low},
               {"accuracy_high", 100 * mean.accuracy.high},
               {"step_seconds", mean.step_seconds},
               {"select_seconds", mean.select_seconds},
               {"attention_seconds", mean.attention_seconds},
               {"ttft_seconds", mean.ttft_seconds},
               {"state_bytes_per_token", mean.state_bytes_per_token},
               {"nonfinite_rows", mean.nonfinite_rows},
               {"tasks", nlohmann::json::object()}});
  if (mean.difference) {
    json["difference"] = 100 * mean.difference->mean;
    json["difference_low"] = 100 * mean.difference->low;
    json["difference_high"] = 100 * mean.difference->high;
  }
  for (const EvalRow& task : row.tasks) json["tasks"][task.task] = 100 * task.accuracy.mean;
  return json;
}

std::string equal_density_table(const CompareReport& report) {
  std::string text =
      "| tokens | wanted density | selector | density | union inflation | recall | p5 | chosen / oracle | RULER | to "
      "dense, points [95 %] |";
  for (const std::string& task : report.tasks) text += fmt::format(" {} |", task);
  text += " step ms | of it select | state B/token |\n|---|---|---|---|---|---|---|---|---|---|";
  for (std::size_t i = 0; i < report.tasks.size() + 3; ++i) text += "---|";
  text += "\n";
  for (const CompareRow& row : report.rows) {
    const CompareSetting& setting = row.setting;
    text += fmt::format(
        "| {} | {} | {} | {:.3f} | {:.2f} | {:.4f} | {:.4f} | {:.4f} |", with_thousands(setting.length_tokens),
        setting.target > 0 ? fmt::format("{:g}", setting.target) : std::string("as given"), setting.spec, row.density(),
        row.union_inflation(), setting.recall, setting.recall_p5, setting.vs_oracle);
    if (row.mean) {
      text += fmt::format(" {:.1f} | {} |", 100 * row.mean->accuracy.mean, difference_text(*row.mean));
      for (const std::string& task : report.tasks) {
        const auto found =
            std::find_if(row.tasks.begin(), row.tasks.end(), [&](const EvalRow& r) { return r.task == task; });
        text += found == row.tasks.end() ? " |" : fmt::format(" {:.1f} |", 100 * found->accuracy.mean);
      }
      text += fmt::format(" {:.2f} | {:.2f} | {} |\n", 1e3 * row.mean->step_seconds, 1e3 * row.mean->select_seconds,
                          bytes_text(row.mean->state_bytes_per_token));
    } else {
      for (std::size_t i = 0; i < report.tasks.size() + 5; ++i) text += " |";
      text += "\n";
    }
  }
  return text;
}

std::string equal_accuracy_table(const CompareReport& report) {
  std::string text =
      "| tokens | selector | least density | union inflation | RULER | to dense, points [95 %] | recall | step ms | "
      "dense step / this |\n|---|---|---|---|---|---|---|---|---|\n";
  for (const EqualAccuracy& entry : equal_accuracy(report)) {
    text += fmt::format("| {} | {} |", with_thousands(entry.length_tokens), entry.selector);
    if (entry.row == nullptr) {
      text += " none | | | | | | |\n";
      continue;
    }
    const CompareRow& row = *entry.row;
    text += fmt::format(" {:.3f} | {:.2f} | {:.1f} | {} | {:.4f} | {:.2f} | {:.2f}x |\n", row.density(),
                        row.union_inflation(), 100 * row.mean->accuracy.mean, difference_text(*row.mean),
                        row.setting.recall, 1e3 * row.mean->step_seconds,
                        entry.dense->mean->step_seconds / row.mean->step_seconds);
  }
  return text;
}

}  // namespace

CompareReport compare_rows(const std::vector<CompareSetting>& settings, const std::vector<EvalRecord>& records,
                           double tolerance) {
  CompareReport report;
  report.tolerance = tolerance;
  for (const EvalRecord& record : records) {
    if (std::find(report.tasks.begin(), report.tasks.end(), record.task) == report.tasks.end())
      report.tasks.push_back(record.task);
  }
  const std::vector<EvalRow> answered = eval_rows(records, MeanRows::kOverTasks);
  for (const CompareSetting& setting : settings) {
    CompareRow row{.setting = setting, .tasks = {}, .mean = {}, .is_dense = setting.spec == kDense};
    for (const EvalRow& answer : answered) {
      if (answer.length_tokens != setting.length_tokens || answer.selector != setting.spec) continue;
      // Their mean follows the tasks of a length; a single task has none and is its own.
      const bool is_task = std::find(report.tasks.begin(), report.tasks.end(), answer.task) != report.tasks.end();
      if (is_task) row.tasks.push_back(answer);
      row.mean = answer;
    }
    report.rows.push_back(std::move(row));
  }
  std::stable_sort(report.rows.begin(), report.rows.end(), [](const CompareRow& a, const CompareRow& b) {
    if (a.setting.length_tokens != b.setting.length_tokens) return a.setting.length_tokens < b.setting.length_tokens;
    if (a.is_dense != b.is_dense) return a.is_dense;
    return a.setting.target < b.setting.target;
  });
  return report;
}

std::vector<EqualAccuracy> equal_accuracy(const CompareReport& report) {
  std::vector<EqualAccuracy> entries;
  const CompareRow* dense = nullptr;
  for (const CompareRow& row : report.rows) {
    if (row.is_dense) dense = &row;
    if (row.is_dense || !row.mean || !row.mean->difference) continue;
    const auto found = std::find_if(entries.begin(), entries.end(), [&](const EqualAccuracy& entry) {
      return entry.length_tokens == row.setting.length_tokens && entry.selector == row.setting.selector;
    });
    EqualAccuracy& entry =
        found != entries.end()
            ? *found
            : entries.emplace_back(EqualAccuracy{row.setting.length_tokens, row.setting.selector, nullptr, dense});
    const bool is_equal = row.mean->difference->mean >= -report.tolerance;
    if (is_equal && (entry.row == nullptr || row.density() < entry.row->density())) entry.row = &row;
  }
  return entries;
}

nlohmann::json compare_json(const EvalConfiguration& configuration, const CompareReport& report) {
  nlohmann::json json = {{"configuration", configuration.json},
                         {"digest", configuration.digest()},
                         {"tasks", report.tasks},
                         {"tolerance", 100 * report.tolerance},
                         {"rows", nlohmann::json::array()},
                         {"equal_accuracy", nlohmann::json::array()}};
  for (const CompareRow& row : report.rows) json["rows"].push_back(row_json(row));
  for (const EqualAccuracy& entry : equal_accuracy(report)) {
    nlohmann::json of_entry = {{"tokens", entry.length_tokens}, {"selector", entry.selector}};
    if (entry.row != nullptr) {
      of_entry.update({{"spec", entry.row->setting.spec},
                       {"density", entry.row->density()},
                       {"accuracy", 100 * entry.row->mean->accuracy.mean},
                       {"difference", 100 * entry.row->mean->difference->mean},
                       {"step_seconds", entry.row->mean->step_seconds},
                       {"speedup", entry.dense->mean->step_seconds / entry.row->mean->step_seconds}});
    }
    json["equal_accuracy"].push_back(std::move(of_entry));
  }
  return json;
}

std::string compare_markdown(const EvalConfiguration& configuration, const CompareReport& report) {
  std::string text = fmt::format(
      "Selectors at equal density: model {}, configuration {}. Recall is of the fitting prompts, everything else of "
      "the "
      "answers.\n\n{}",
      configuration.json.value("model", "not said"), configuration.digest(), equal_density_table(report));
  if (report.tasks.empty()) return text;
  return text + fmt::format(
                    "\nAt equal accuracy: of each selector the least density whose mean is at most {:g} points below "
                    "dense's on the same samples.\n\n{}",
                    100 * report.tolerance, equal_accuracy_table(report));
}

}  // namespace compact::engine
