#include "engine/scheduler/generate.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "compact/paged_kv.h"
#include "engine/model/stopwatch.h"

namespace compact::engine {
namespace {

std::int32_t pages_for(std::int64_t tokens, std::int32_t page_tokens) {
  return static_cast<std::int32_t>((tokens + page_tokens - 1) / page_tokens);
}

Status check_request(const ModelConfig& config, std::int64_t prompt_tokens, const GenerateOptions& options) {
  if (options.chunk_tokens < 1) {
    return invalid_argument(
        fmt::format("chunk is {} tokens\n  allowed: 1 or more; 1024 is usual", options.chunk_tokens));
  }
  if (options.max_tokens < 1) {
    return invalid_argument(fmt::format("max-tokens is {}\n  allowed: 1 or more", options.max_tokens));
  }
  if (options.kv_pages < 0) {
    return invalid_argument(
        fmt::format("kv-pages is {}\n  allowed: 1 or more, or 0 for as many as needed", options.kv_pages));
  }
  if (prompt_tokens == 0) return invalid_argument("the prompt is empty\n  allowed: at least one token");
  if (prompt_tokens > config.max_position_embeddings) {
    return invalid_argument(
        fmt::format("the prompt has {} tokens; the model has {} positions\n"
                    "  try: a prompt shorter by {} tokens, or a model made for longer contexts",
                    prompt_tokens, config.max_position_embeddings, prompt_tokens - config.max_position_embeddings));
  }
  return {};
}

}  // namespace

Result<GenerateResult> generate(const Transformer& model, std::span<const std::int32_t> prompt,
                                const GenerateOptions& options, const GenerateCallbacks& callbacks, ThreadPool& pool) {
  const ModelConfig& config = model.config();
  const auto prompt_tokens = static_cast<std::int64_t>(prompt.size());
  CA_RETURN_IF_ERROR(check_request(config, prompt_tokens, options));
  CA_ASSIGN_OR_RETURN(Sampler sampler, Sampler::create(options.sampling));
  CA_ASSIGN_OR_RETURN(ChunkAttention attention,
                      ChunkAttention::create(options.sparsity, config.num_hidden_layers, config.num_attention_heads,
                                             config.num_key_value_heads, model.softmax_scale()));

  // The last sampled token is never fed back, so it needs no room.
  const std::int64_t positions =
      std::min<std::int64_t>(prompt_tokens + options.max_tokens - 1, config.max_position_embeddings);
  PagedKvOptions cache_options{
      config.num_hidden_layers, config.num_key_value_heads, config.head_dim, options.page_tokens,
      options.kv_pages,         options.kv_dtype,           KvLayout::kHnd,  attention.needs_page_means()};
  // A page size that create() will refuse must not divide here.
  if (options.kv_pages == 0) cache_options.num_pages = pages_for(positions, std::max(1, options.page_tokens));
  CA_ASSIGN_OR_RETURN(PagedKvCache cache, PagedKvCache::create(cache_options));
  const std::int32_t prompt_pages = pages_for(prompt_tokens, options.page_tokens);
  if (prompt_pages > cache_options.num_pages) {
    return out_of_memory(
        fmt::format("the prompt of {} tokens needs {} KV pages of {} tokens; the cache has {}\n"
                    "  try: --kv-pages {}, or leave it out",
                    prompt_tokens, prompt_pages, options.page_tokens, cache_options.num_pages,
                    pages_for(positions, options.page_tokens)));
  }

  GenerateResult result;
  result.prompt_tokens = static_cast<std::int32_t>(prompt_tokens);
  result.kv_bytes = cache.kv_bytes();
  result.summary_bytes = cache.summary_bytes();

  const RequestId request = cache.add_request();
  std::vector<float> logits;
  const Stopwatch prefill_stopwatch;
  for (std::size_t begin = 0; begin < prompt.size();) {
    const std::size_t chunk = std::min(prompt.size() - begin, static_cast<std::size_t>(options.chunk_tokens));
    const bool is_last = begin + chunk == prompt.size();
    CA_RETURN_IF_ERROR(model.forward(prompt.subspan(begin, chunk), request, is_last && options.final_chunk_dense,
                                     is_last ? LogitsOf::kLastToken : LogitsOf::kNone, cache, attention, pool, logits));
    begin += chunk;
    ++result.prefill_chunks;
    if (callbacks.on_prefill) callbacks.on_prefill(static_cast<std::int32_t>(begin), result.prompt_tokens);
  }
  std::int32_t token = sampler.sample(logits);
  result.prefill_seconds = prefill_stopwatch.seconds();
  result.layers = attention.take_reports();

  const Stopwatch decode_stopwatch;
  for (std::int64_t position = prompt_tokens;; ++position) {
    if (std::find(options.end_tokens.begin(), options.end_tokens.end(), token) != options.end_tokens.end()) {
      result.stopped_by_end_token = true;
      break;
    }
    result.tokens.push_back(token);
    if (callbacks.on_token) callbacks.on_token(token);
    if (callbacks.stop && callbacks.stop()) break;
    const bool out_of_room = position >= config.max_position_embeddings ||
                             pages_for(position + 1, options.page_tokens) > cache_options.num_pages;
    if (std::ssize(result.tokens) >= options.max_tokens || out_of_room) break;
    CA_RETURN_IF_ERROR(model.forward(std::span(&token, 1), request, /*dense=*/true, LogitsOf::kLastToken, cache,
                                     attention, pool, logits));
    token = sampler.sample(logits);
  }
  result.decode_seconds = decode_stopwatch.seconds();
  CA_RETURN_IF_ERROR(cache.release(request));
  return result;
}

}  // namespace compact::engine
