#include "engine/model/model.h"

#include <fmt/format.h>

#include <cmath>
#include <unordered_set>

namespace compact::engine {

float softmax_scale(const ModelConfig& config) noexcept {
  return 1.0F / std::sqrt(static_cast<float>(config.head_dim));
}

SummaryFields either(const SummaryFields& a, const SummaryFields& b) {
  return {.mean_k = a.mean_k || b.mean_k,
          .sub_mean_k = a.sub_mean_k || b.sub_mean_k,
          .mean_v = a.mean_v || b.mean_v,
          .norm_k = a.norm_k || b.norm_k,
          .coherence = a.coherence || b.coherence,
          .gate_pool = a.gate_pool || b.gate_pool};
}

Status check_batch_options(const BatchOptions& options) {
  if (options.num_pages < 1 || options.max_step_tokens < 1 || options.max_requests < 1) {
    return invalid_argument(
        fmt::format("a cache of {} pages, {} requests and steps of {} tokens\n  allowed: 1 or more of each",
                    options.num_pages, options.max_requests, options.max_step_tokens));
  }
  if (options.max_request_pages < 0 || options.max_request_pages > options.num_pages) {
    return invalid_argument(
        fmt::format("requests of up to {} pages\n  allowed: up to {}, the pages of the cache; 0: all",
                    options.max_request_pages, options.num_pages));
  }
  return {};
}

Status check_new_request(const BatchOptions& options, const PageTables& tables,
                         std::span<const std::int32_t> prefix_pages) {
  if (tables.num_requests() >= options.max_requests) {
    return invalid_argument(
        fmt::format("{} requests are live\n  allowed: {}", tables.num_requests(), options.max_requests));
  }
  if (std::ssize(prefix_pages) > options.request_pages()) {
    return invalid_argument(fmt::format("a prefix of {} pages\n  allowed: up to {}, the longest page table",
                                        prefix_pages.size(), options.request_pages()));
  }
  return {};
}

namespace {

// Whether `tokens` may stand at positions [start, start + size).
Status check_chunk(const ModelConfig& config, std::span<const std::int32_t> tokens, std::int64_t start) {
  for (const std::int32_t token : tokens) {
    if (token < 0 || token >= config.vocab_size) {
      return invalid_argument(
          fmt::format("token id {} is not in the model's vocabulary of {}", token, config.vocab_size));
    }
  }
  if (start + std::ssize(tokens) > config.max_position_embeddings) {
    return invalid_argument(fmt::format("the context needs {} positions; the model was made for {}",
                                        start + std::ssize(tokens), config.max_position_embeddings));
  }
  return {};
}

}  // namespace

Status check_step(const ModelConfig& config, const BatchOptions& options, const PageTables& tables,
                  std::span<const BatchPart> parts) {
  std::int64_t step_tokens = 0;
  std::int64_t new_pages = 0;
  std::unordered_set<RequestId> seen;
  for (const BatchPart& part : parts) {
    CA_ASSIGN_OR_RETURN(const std::int32_t start, tables.length(part.request));
    if (!seen.insert(part.request).second) {
      return invalid_argument(fmt::format("two parts of request {}\n  allowed: one in a step", part.request));
    }
    if (part.tokens.empty()) {
      return invalid_argument(fmt::format("no tokens for request {}\n  allowed: 1 or more", part.request));
    }
    CA_RETURN_IF_ERROR(check_chunk(config, part.tokens, start));
    const std::int64_t context = start + std::ssize(part.tokens);
    const std::int64_t pages = (context + options.page_tokens - 1) / options.page_tokens;
    if (pages > options.request_pages()) {
      return out_of_memory(fmt::format("a context of {} tokens needs {} KV pages of {} tokens; a request may have {}",
                                       context, pages, options.page_tokens, options.request_pages()));
    }
    step_tokens += std::ssize(part.tokens);
    CA_ASSIGN_OR_RETURN(const std::int32_t more,
                        tables.pages_to_extend(part.request, static_cast<std::int32_t>(std::ssize(part.tokens))));
    new_pages += more;
  }
  if (step_tokens > options.max_step_tokens) {
    return invalid_argument(
        fmt::format("a step of {} tokens\n  allowed: up to {}", step_tokens, options.max_step_tokens));
  }
  if (new_pages > tables.num_free_pages()) {
    return out_of_memory(fmt::format("a step of {} requests needs {} more KV pages of {} tokens; {} of {} are free",
                                     parts.size(), new_pages, options.page_tokens, tables.num_free_pages(),
                                     tables.num_pages()));
  }
  return {};
}

Result<Sequence> Sequence::create(const Model& model, const BatchOptions& options) {
  if (options.max_requests != 1) {
    return invalid_argument(fmt::format("a sequence of {} requests\n  allowed: 1", options.max_requests));
  }
  CA_ASSIGN_OR_RETURN(std::unique_ptr<Batch> batch, model.start(options));
  CA_ASSIGN_OR_RETURN(const RequestId request, batch->add_request({}));
  return Sequence(std::move(batch), request);
}

Status Sequence::forward(std::span<const std::int32_t> tokens, bool dense, LogitsOf logits_of, ThreadPool& pool,
                         std::vector<float>& logits) {
  logits.clear();
  if (tokens.empty()) return {};
  const BatchPart part{request_, tokens, dense, logits_of};
  return batch_->forward(std::span(&part, 1), pool, logits);
}

}  // namespace compact::engine
