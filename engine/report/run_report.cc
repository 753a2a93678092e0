#include "engine/report/run_report.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "compact/attention.h"

namespace compact::engine {
namespace {

// "dense" names the execution when no list was ever wanted; otherwise the way lists are united.
const char* mode_name(const GenerateOptions& options) {
  return options.sparsity.selector.name == "dense" ? "dense" : union_mode_name(options.sparsity.unite.mode);
}

nlohmann::json dense_decisions(const LayerReport& layer) {
  nlohmann::json counts = nlohmann::json::object();
  for (std::int32_t reason = 0; reason < kNumDenseReasons; ++reason) {
    const std::int64_t chunks = layer.chunks_by_reason[static_cast<std::size_t>(reason)];
    if (chunks > 0) counts[dense_reason_name(static_cast<DenseReason>(reason))] = chunks;
  }
  return counts;
}

}  // namespace

RunTotals sum_layers(const GenerateResult& result) {
  RunTotals totals;
  for (const LayerReport& layer : result.layers) {
    totals.append_seconds += layer.append_seconds;
    totals.select_seconds += layer.select_seconds;
    totals.unite_seconds += layer.unite_seconds;
    totals.attend_seconds += layer.attend_seconds;
    totals.attention_seconds += layer.attention_seconds();
    totals.stats.add(layer.stats);
  }
  return totals;
}

nlohmann::json run_json(const Answer& answer, const GenerateOptions& options) {
  const GenerateResult& result = answer.result;
  const RunTotals totals = sum_layers(result);
  nlohmann::json json = {
      {"answer", answer.text},
      {"prompt_tokens", result.prompt_tokens},
      {"generated_tokens", result.tokens.size()},
      {"stopped_by", result.stopped_by_end_token ? "end_token" : "length"},
      {"ttft_seconds", answer.ttft_seconds},
      {"prefill_seconds", result.prefill_seconds},
      {"decode_seconds", result.decode_seconds},
      {"attention_seconds", totals.attention_seconds},
      {"select_seconds", totals.select_seconds},
      {"unite_seconds", totals.unite_seconds},
      {"attend_seconds", totals.attend_seconds},
      {"append_seconds", totals.append_seconds},
      {"density", totals.stats.density()},
      {"union_inflation", totals.stats.union_inflation()},
      {"selector", options.sparsity.selector.name},
      {"mode", mode_name(options)},
      {"backend", backend_name(result.backend)},
      {"processor", result.processor},
      {"cpu_target", cpu_attention_target()},
      {"chunk_tokens", options.chunk_tokens},
      {"page_tokens", options.page_tokens},
      {"kv_dtype", dtype_name(options.kv_dtype)},
      {"kv_bytes", result.kv_bytes},
      {"summary_bytes", result.summary_bytes},
      {"sink_tokens", options.sparsity.forced.sink_tokens},
      {"window_tokens", options.sparsity.forced.window_tokens},
      {"min_context_tokens", options.sparsity.crossover.min_context_tokens},
  };
  if (options.sparsity.selector.name == "mean-key") {
    const MeanKeyOptions& mean_key = options.sparsity.selector.mean_key;
    json["threshold"] =
        mean_key.alpha >= 0 ? nlohmann::json{{"alpha", mean_key.alpha}} : nlohmann::json{{"share", mean_key.share}};
  }
  json["layers"] = nlohmann::json::array();
  for (const LayerReport& layer : result.layers) {
    json["layers"].push_back({{"density", layer.stats.density()},
                              {"union_inflation", layer.stats.union_inflation()},
                              {"select_seconds", layer.select_seconds},
                              {"unite_seconds", layer.unite_seconds},
                              {"attend_seconds", layer.attend_seconds},
                              {"append_seconds", layer.append_seconds},
                              {"nonfinite_rows", layer.nonfinite_rows},
                              {"chunks", dense_decisions(layer)}});
  }
  return json;
}

std::string run_table(const Answer& answer, const GenerateOptions& options) {
  const GenerateResult& result = answer.result;
  const RunTotals totals = sum_layers(result);
  std::string text = fmt::format(
      "prompt {} tokens in {} chunks of {}; selector {}, mode {}, backend {} ({})\n"
      "TTFT {:.2f} s, of it attention {:.2f} s (select {:.2f}, unite {:.3f}, attend {:.2f}); decode {:.2f} s\n"
      "density {:.3f}, union inflation {:.2f}; KV cache {:.1f} MB, page means {:.2f} MB\n",
      with_thousands(result.prompt_tokens), result.prefill_chunks, options.chunk_tokens, options.sparsity.selector.name,
      mode_name(options), backend_name(result.backend), result.processor, answer.ttft_seconds, totals.attention_seconds,
      totals.select_seconds, totals.unite_seconds, totals.attend_seconds, result.decode_seconds, totals.stats.density(),
      totals.stats.union_inflation(), static_cast<double>(result.kv_bytes) / 1e6,
      static_cast<double>(result.summary_bytes) / 1e6);
  text += "layer  density  inflation  attention s  chunks\n";
  for (std::size_t i = 0; i < result.layers.size(); ++i) {
    const LayerReport& layer = result.layers[i];
    std::string chunks;
    for (std::int32_t reason = 0; reason < kNumDenseReasons; ++reason) {
      const std::int64_t count = layer.chunks_by_reason[static_cast<std::size_t>(reason)];
      if (count == 0) continue;
      const auto name = reason == 0 ? std::string("by page list")
                                    : fmt::format("dense ({})", dense_reason_name(static_cast<DenseReason>(reason)));
      chunks += fmt::format("{}{} {}", chunks.empty() ? "" : ", ", count, name);
    }
    text += fmt::format("{:5}  {:7.3f}  {:9.2f}  {:11.3f}  {}\n", i, layer.stats.density(),
                        layer.stats.union_inflation(), layer.attention_seconds(), chunks);
  }
  return text;
}

PageMapInput run_page_map(const Answer& answer, const GenerateOptions& options) {
  const RunTotals totals = sum_layers(answer.result);
  PageMapInput picture;
  picture.caption =
      fmt::format("{} tokens in chunks of {} (down), pages of {} (across); density {:.3f}, union inflation {:.2f}",
                  with_thousands(answer.result.prompt_tokens), options.chunk_tokens, options.page_tokens,
                  totals.stats.density(), totals.stats.union_inflation());
  picture.prompt_tokens = answer.result.prompt_tokens;
  picture.chunk_tokens = options.chunk_tokens;
  picture.page_tokens = options.page_tokens;
  picture.layers = &answer.result.layers;
  return picture;
}

std::string with_thousands(std::int64_t value) {
  std::string digits = fmt::format("{}", value);
  for (std::int64_t at = std::ssize(digits) - 3; at > (value < 0 ? 1 : 0); at -= 3) {
    digits.insert(static_cast<std::size_t>(at), 1, ',');
  }
  return digits;
}

}  // namespace compact::engine
