#include "engine/bench/prefill.h"

#include <algorithm>
#include <random>
#include <vector>

#include "engine/cuda/cuda_model.h"
#include "engine/model/stopwatch.h"

namespace compact::engine {

Result<PrefillTimes> bench_prefill(const Model& model, std::int32_t context, const SessionOptions& options,
                                   ThreadPool& pool) {
  std::minstd_rand random(1);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(std::max(0, context)));
  for (std::int32_t& token : tokens) {
    token = static_cast<std::int32_t>(random() % static_cast<unsigned>(model.config().vocab_size));
  }
  reset_cuda_memory_peak();
  CA_ASSIGN_OR_RETURN(Session session, Session::create(model, context, 0, options));
  const Stopwatch stopwatch;
  CA_RETURN_IF_ERROR(session.prefill(tokens, LogitsOf::kLastToken, {}, pool));
  PrefillTimes times;
  times.ttft_seconds = stopwatch.seconds();
  times.peak_bytes = cuda_memory_use().peak_bytes;
  CA_ASSIGN_OR_RETURN(const std::vector<LayerReport> layers, session.sequence().take_reports());
  for (const LayerReport& layer : layers) {
    times.append_seconds += layer.append_seconds;
    times.select_seconds += layer.select_seconds;
    times.unite_seconds += layer.unite_seconds;
    times.attend_seconds += layer.attend_seconds;
    times.stats.add(layer.stats);
  }
  return times;
}

PrefillFlop dense_prefill_flop(const ModelConfig& config, std::int32_t context) {
  const double hidden = config.hidden_size;
  const double q_width = 1.0 * config.num_attention_heads * config.head_dim;
  const double kv_width = 1.0 * config.num_key_value_heads * config.head_dim;
  const ExpertConfig& experts = config.experts;
  double of_token = 0;  // weights of products, all layers
  for (std::int32_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    of_token += hidden * (2 * q_width + 2 * kv_width);
    of_token += config.has_experts(layer)
                    ? hidden * (experts.num_experts + 3.0 * experts.experts_per_token * experts.intermediate_size)
                    : hidden * 3.0 * config.intermediate_size;
  }
  const double tokens = context;
  return {2 * (tokens * of_token + hidden * config.vocab_size),
          4 * q_width * config.num_hidden_layers * tokens * (tokens + 1) / 2};
}

}  // namespace compact::engine
