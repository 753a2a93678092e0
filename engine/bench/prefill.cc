#include "engine/bench/prefill.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "engine/cuda/cuda_model.h"
#include "engine/model/stopwatch.h"

namespace compact::engine {

namespace {

Result<std::vector<LayerReport>> prefill_together(const Model& model,
                                                  std::span<const std::vector<std::int32_t>> prompts,
                                                  const SessionOptions& options, PrefillTimes& times,
                                                  ThreadPool& pool) {
  const std::size_t length = prompts.front().size();  // of every prompt
  const auto num_requests = static_cast<std::int32_t>(prompts.size());
  CA_ASSIGN_OR_RETURN(BatchOptions of_batch,
                      batch_options(model.config(), static_cast<std::int64_t>(length), 0, options));
  // Of one request so far.
  constexpr std::int32_t kMost = INT32_MAX / 2;
  if (num_requests > kMost / std::max(of_batch.num_pages, of_batch.max_step_tokens)) {
    return invalid_argument(fmt::format("{} requests of {} pages and chunks of {} tokens\n  allowed: {} of each in all",
                                        num_requests, of_batch.num_pages, of_batch.max_step_tokens, kMost));
  }
  of_batch.max_requests = num_requests;
  of_batch.max_request_pages = of_batch.num_pages;
  of_batch.num_pages *= num_requests;
  of_batch.max_step_tokens *= num_requests;
  CA_ASSIGN_OR_RETURN(const std::unique_ptr<Batch> batch, model.start(of_batch));
  std::vector<BatchPart> parts(prompts.size());
  for (BatchPart& part : parts) {
    CA_ASSIGN_OR_RETURN(part.request, batch->add_request({}));
  }
  std::vector<float> logits;
  const Stopwatch stopwatch;
  for (std::size_t begin = 0; begin < length;) {
    const std::size_t chunk = std::min(length - begin, static_cast<std::size_t>(options.chunk_tokens));
    const bool is_last = begin + chunk == length;
    for (std::size_t b = 0; b < parts.size(); ++b) {
      parts[b].tokens = std::span(prompts[b]).subspan(begin, chunk);
      parts[b].dense = is_last && options.final_chunk_dense;
      parts[b].logits = is_last ? LogitsOf::kLastToken : LogitsOf::kNone;
    }
    CA_RETURN_IF_ERROR(batch->forward(parts, pool, logits));
    begin += chunk;
  }
  times.ttft_seconds = stopwatch.seconds();
  times.peak_bytes = cuda_memory_use().peak_bytes;
  return batch->take_reports();
}

}  // namespace

Result<PrefillTimes> bench_prefill(const Model& model, std::int32_t requests, std::int32_t context,
                                   const SessionOptions& options, ThreadPool& pool) {
  std::minstd_rand random(1);
  std::vector<std::vector<std::int32_t>> prompts(static_cast<std::size_t>(std::max(1, requests)));
  for (std::vector<std::int32_t>& prompt : prompts) {
    prompt.resize(static_cast<std::size_t>(std::max(0, context)));
    for (std::int32_t& token : prompt) {
      token = static_cast<std::int32_t>(random() % static_cast<unsigned>(model.config().vocab_size));
    }
  }
  reset_cuda_memory_peak();
  PrefillTimes times;
  CA_ASSIGN_OR_RETURN(const std::vector<LayerReport> layers, prefill_together(model, prompts, options, times, pool));
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
