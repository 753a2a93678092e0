#include "engine/report/recall_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "engine/report/run_report.h"

namespace compact::engine {
namespace {

RecallSums sum_of(const std::vector<RecallSums>& heads) {
  RecallSums all;
  for (const RecallSums& head : heads) all.add(head);
  return all;
}

nlohmann::json sums_json(const RecallSums& sums) {
  return {{"rows_tokens", sums.tokens()},          {"recall", sums.recall()},
          {"oracle_recall", sums.oracle_recall()}, {"row_oracle_recall", sums.row_oracle_recall()},
          {"far_recall", sums.far_recall()},       {"vs_oracle", sums.vs_oracle()}};
}

nlohmann::json selector_json(const SelectorRecall& selector) {
  const UnionStats stats = selector.stats();
  nlohmann::json json = sums_json(selector.sums());
  json.update({{"selector", selector.label},
               {"density", stats.density()},
               {"union_inflation", stats.union_inflation()},
               {"recall_p5", selector.spread.percentile5()},
               {"oracle_recall_p5", selector.oracle_spread.percentile5()},
               {"select_seconds", selector.select_seconds},
               {"unite_seconds", selector.unite_seconds},
               {"nonfinite_rows", selector.nonfinite_rows},
               {"layers", nlohmann::json::array()}});
  for (std::size_t layer = 0; layer < selector.heads.size(); ++layer) {
    nlohmann::json of_layer = sums_json(sum_of(selector.heads[layer]));
    of_layer["layer"] = layer;
    of_layer["density"] = selector.layer_stats[layer].density();
    of_layer["union_inflation"] = selector.layer_stats[layer].union_inflation();
    for (std::size_t head = 0; head < selector.heads[layer].size(); ++head) {
      of_layer["heads"].push_back(sums_json(selector.heads[layer][head]));
      of_layer["heads"].back()["head"] = head;
    }
    json["layers"].push_back(std::move(of_layer));
  }
  return json;
}

std::string layer_table(const GroupRecall& group) {
  std::string text = fmt::format("\n{}: recall by layer, mean and lowest head\n\n| layer |", group.group);
  std::string rule = "\n|---|";
  for (const SelectorRecall& selector : group.selectors) {
    text += fmt::format(" {} |", selector.label);
    rule += "---|";
  }
  text += rule + "\n";
  for (std::size_t layer = 0; layer < group.selectors.front().heads.size(); ++layer) {
    text += fmt::format("| {} |", layer);
    for (const SelectorRecall& selector : group.selectors) {
      const std::vector<RecallSums>& heads = selector.heads[layer];
      const auto lowest = std::min_element(
          heads.begin(), heads.end(), [](const RecallSums& a, const RecallSums& b) { return a.recall() < b.recall(); });
      text +=
          fmt::format(" {:.3f}, {:.3f} (head {}) |", sum_of(heads).recall(), lowest->recall(), lowest - heads.begin());
    }
    text += "\n";
  }
  return text;
}

}  // namespace

nlohmann::json recall_json(const EvalConfiguration& configuration, const std::vector<GroupRecall>& groups) {
  nlohmann::json json = {
      {"configuration", configuration.json}, {"digest", configuration.digest()}, {"groups", nlohmann::json::array()}};
  for (const GroupRecall& group : groups) {
    nlohmann::json of_group = {{"group", group.group}, {"prompts", group.prompts}, {"tokens", group.tokens}};
    for (const SelectorRecall& selector : group.selectors) of_group["selectors"].push_back(selector_json(selector));
    json["groups"].push_back(std::move(of_group));
  }
  return json;
}

std::string recall_markdown(const EvalConfiguration& configuration, const std::vector<GroupRecall>& groups) {
  std::string text = fmt::format(
      "Recall of attention mass: configuration {}\n\n"
      "| prompts | tokens | selector | density | union inflation | recall | p5 | oracle | oracle p5 | row oracle | "
      "chosen / oracle | select s | unite s |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
      configuration.digest());
  for (const GroupRecall& group : groups) {
    for (const SelectorRecall& selector : group.selectors) {
      const RecallSums sums = selector.sums();
      const UnionStats stats = selector.stats();
      text += fmt::format(
          "| {} x {} | {} | {} | {:.3f} | {:.2f} | {:.4f} | {:.4f} | {:.4f} | {:.4f} | {:.4f} | {:.4f} | {:.2f} | "
          "{:.2f} "
          "|\n",
          group.prompts, group.group, with_thousands(group.tokens), selector.label, stats.density(),
          stats.union_inflation(), sums.recall(), selector.spread.percentile5(), sums.oracle_recall(),
          selector.oracle_spread.percentile5(), sums.row_oracle_recall(), sums.vs_oracle(), selector.select_seconds,
          selector.unite_seconds);
    }
  }
  for (const GroupRecall& group : groups) text += layer_table(group);
  return text;
}

}  // namespace compact::engine
