#include "engine/eval/record.h"

#include <fmt/format.h>

#include <cstddef>
#include <set>
#include <utility>

namespace compact::engine {

using Json = nlohmann::json;

void RunFigures::add(const std::vector<LayerReport>& layers) {
  for (const LayerReport& layer : layers) {
    attention_seconds += layer.attention_seconds();
    select_seconds += layer.select_seconds + layer.unite_seconds;
    stats.add(layer.stats);
    nonfinite_rows += layer.nonfinite_rows;
    for (std::size_t i = 0; i < layer.chunks_by_reason.size(); ++i) {
      const auto reason = static_cast<DenseReason>(i);
      steps += layer.chunks_by_reason[i];
      if (reason != DenseReason::kNone && reason != DenseReason::kFirstChunk) dense_chunks += layer.chunks_by_reason[i];
    }
  }
}

void put_figures(const RunFigures& figures, Json& json) {
  json.update({{"prompt_tokens", figures.prompt_tokens},
               {"ttft_seconds", figures.ttft_seconds},
               {"attention_seconds", figures.attention_seconds},
               {"select_seconds", figures.select_seconds},
               {"steps", figures.steps},
               {"state_bytes_per_token", figures.state_bytes_per_token},
               {"listed_row_pages", figures.stats.listed_row_pages},
               {"wanted_row_pages", figures.stats.wanted_row_pages},
               {"visible_row_pages", figures.stats.visible_row_pages},
               {"dense_chunks", figures.dense_chunks},
               {"nonfinite_rows", figures.nonfinite_rows}});
}

void get_figures(const Json& json, RunFigures& figures) {
  json.at("prompt_tokens").get_to(figures.prompt_tokens);
  json.at("ttft_seconds").get_to(figures.ttft_seconds);
  json.at("attention_seconds").get_to(figures.attention_seconds);
  json.at("select_seconds").get_to(figures.select_seconds);
  json.at("steps").get_to(figures.steps);
  json.at("state_bytes_per_token").get_to(figures.state_bytes_per_token);
  json.at("listed_row_pages").get_to(figures.stats.listed_row_pages);
  json.at("wanted_row_pages").get_to(figures.stats.wanted_row_pages);
  json.at("visible_row_pages").get_to(figures.stats.visible_row_pages);
  json.at("dense_chunks").get_to(figures.dense_chunks);
  json.at("nonfinite_rows").get_to(figures.nonfinite_rows);
}

Json to_json(const EvalRecord& record) {
  Json json = {{"task", record.task},
               {"tokens", record.length_tokens},
               {"sample", record.index},
               {"selector", record.selector},
               {"score", record.score},
               {"answers", record.answers},
               {"output", record.output},
               {"generated_tokens", record.generated_tokens},
               {"decode_seconds", record.decode_seconds}};
  put_figures(record, json);
  return json;
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
    json.at("generated_tokens").get_to(record.generated_tokens);
    json.at("decode_seconds").get_to(record.decode_seconds);
    get_figures(json, record);
  } catch (const Json::exception& error) {
    return io_error(fmt::format("{}: not a record of compact eval: {}", where, error.what()));
  }
  return record;
}

Result<std::vector<EvalRecord>> answers_of(const std::vector<WorkLine>& lines) {
  std::vector<EvalRecord> records;
  std::set<EvalRecord::Key> keys;
  for (const WorkLine& line : lines) {
    if (!line.is("answer")) continue;
    CA_ASSIGN_OR_RETURN(EvalRecord record, record_from_json(line.json, line.where));
    if (!keys.insert(record.key()).second) {
      return io_error(fmt::format("{}: sample {} of {} at {} tokens with selector {} is answered twice", line.where,
                                  record.index, record.task, record.length_tokens, record.selector));
    }
    records.push_back(std::move(record));
  }
  return records;
}

}  // namespace compact::engine
