#include "engine/scheduler/session.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace compact::engine {
namespace {

std::int64_t pages_for(std::int64_t tokens, std::int32_t page_tokens) {
  return (tokens + page_tokens - 1) / page_tokens;
}

Status check_request(const ModelConfig& config, std::int64_t prompt_tokens, const SessionOptions& options) {
  if (options.chunk_tokens < 1) {
    return invalid_argument(
        fmt::format("chunk is {} tokens\n  allowed: 1 or more; 1024 is usual", options.chunk_tokens));
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

Result<BatchOptions> batch_options(const ModelConfig& config, std::int64_t prompt_tokens, std::int64_t decode_tokens,
                                   const SessionOptions& options, SummaryFields extra) {
  CA_RETURN_IF_ERROR(check_request(config, prompt_tokens, options));
  const std::int64_t positions = std::min<std::int64_t>(prompt_tokens + decode_tokens, config.max_position_embeddings);
  // A page size that the cache will refuse must not divide here.
  const std::int32_t page_tokens = std::max(1, options.page_tokens);
  const auto num_pages =
      options.kv_pages > 0 ? options.kv_pages : static_cast<std::int32_t>(pages_for(positions, page_tokens));
  const std::int64_t prompt_pages = pages_for(prompt_tokens, page_tokens);
  if (prompt_pages > num_pages) {
    return out_of_memory(
        fmt::format("the prompt of {} tokens needs {} KV pages of {} tokens; the cache has {}\n"
                    "  try: --kv-pages {}, or leave it out",
                    prompt_tokens, prompt_pages, options.page_tokens, num_pages, pages_for(positions, page_tokens)));
  }
  return BatchOptions{
      .max_step_tokens = static_cast<std::int32_t>(std::min<std::int64_t>(options.chunk_tokens, prompt_tokens)),
      .page_tokens = options.page_tokens,
      .num_pages = num_pages,
      .kv_dtype = options.kv_dtype,
      .sparsity = options.sparsity,
      .extra = extra};
}

Result<Session> Session::create(const Model& model, std::int64_t prompt_tokens, std::int64_t decode_tokens,
                                const SessionOptions& options, SummaryFields extra) {
  CA_ASSIGN_OR_RETURN(const BatchOptions of_batch,
                      batch_options(model.config(), prompt_tokens, decode_tokens, options, extra));
  CA_ASSIGN_OR_RETURN(Sequence sequence, Sequence::create(model, of_batch));
  Session session(std::move(sequence));
  session.chunk_tokens_ = options.chunk_tokens;
  session.final_chunk_dense_ = options.final_chunk_dense;
  session.max_positions_ = std::min<std::int64_t>(model.config().max_position_embeddings,
                                                  std::int64_t{of_batch.num_pages} * options.page_tokens);
  return session;
}

Status Session::prefill(std::span<const std::int32_t> prompt, LogitsOf logits_of, const OnChunk& on_chunk,
                        ThreadPool& pool) {
  for (std::size_t begin = 0; begin < prompt.size();) {
    const std::size_t chunk = std::min(prompt.size() - begin, static_cast<std::size_t>(chunk_tokens_));
    const bool is_last = begin + chunk == prompt.size();
    const LogitsOf of_chunk = logits_of == LogitsOf::kLastToken && !is_last ? LogitsOf::kNone : logits_of;
    CA_RETURN_IF_ERROR(
        sequence_.forward(prompt.subspan(begin, chunk), is_last && final_chunk_dense_, of_chunk, pool, logits_));
    begin += chunk;
    length_ += static_cast<std::int64_t>(chunk);
    if (on_chunk) CA_RETURN_IF_ERROR(on_chunk(static_cast<std::int32_t>(begin), logits_));
  }
  return {};
}

Status Session::decode(std::int32_t token, ThreadPool& pool) {
  CA_RETURN_IF_ERROR(sequence_.forward(std::span(&token, 1), /*dense=*/true, LogitsOf::kLastToken, pool, logits_));
  ++length_;
  return {};
}

}  // namespace compact::engine
