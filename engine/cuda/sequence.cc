// A chunk through the layers, from token ids to logits.
#include "engine/cuda/sequence.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace compact::engine {
Status CudaSequence::product(const Bf16Bits* w, const DeviceBuffer& x, const DeviceBuffer& y, std::int32_t out,
                             std::int32_t in, std::int32_t rows, Gemm::Output output) {
  return model_->gemm().run(w, x.data(), y.data(), out, in, rows, output, gemm_workspace_.data(), stream_.get());
}

Status CudaSequence::forward(std::span<const std::span<const std::int32_t>> tokens, bool dense, LogitsOf logits_of,
                             ThreadPool& pool, std::vector<float>& logits) {
  logits.clear();
  if (std::ssize(tokens) != num_requests_) {
    return invalid_argument(
        fmt::format("tokens of {} requests\n  allowed: of all {} of the batch", tokens.size(), num_requests_));
  }
  if (std::all_of(tokens.begin(), tokens.end(), [](const auto& of_request) { return of_request.empty(); })) return {};
  CA_ASSIGN_OR_RETURN(const Chunk chunk, begin_chunk(tokens, dense));
  const ModelConfig& c = *config_;
  CA_RETURN_IF_ERROR(cuda_status(
      launch_embed(reinterpret_cast<const std::int32_t*>(input_.as<CudaChunk>() + num_requests_),
                   model_->weights().embedding(), chunk.rows, c.hidden_size, residual_.as<Bf16Bits>(), stream_.get()),
      "embedding"));
  for (std::int32_t layer = 0; layer < c.num_hidden_layers; ++layer) {
    CA_RETURN_IF_ERROR(run_layer(chunk, layer, pool));
  }
  for (std::size_t b = 0; b < lengths_.size(); ++b) lengths_[b] += chunk.parts[b].view.chunk_tokens;
  return logits_of == LogitsOf::kNone ? Status() : read_logits(chunk, logits_of, logits);
}

// Whether the tokens fit behind those of the request, and why their attention is dense, if it is.
Result<CudaSequence::Part> CudaSequence::check_part(std::size_t request, std::span<const std::int32_t> tokens,
                                                    bool dense) const {
  if (tokens.empty()) return Part();  // rests: a chunk of nothing at position 0
  const std::int32_t start = lengths_[request];
  CA_RETURN_IF_ERROR(check_chunk(*config_, tokens, start));
  const std::int64_t context = start + std::ssize(tokens);
  if (context > std::int64_t{options_.num_pages} * options_.page_tokens) {
    return out_of_memory(fmt::format("a context of {} tokens needs {} KV pages of {} tokens; the cache has {}", context,
                                     (context + options_.page_tokens - 1) / options_.page_tokens, options_.page_tokens,
                                     options_.num_pages));
  }
  if (std::ssize(tokens) > options_.max_chunk_tokens) {
    return invalid_argument(
        fmt::format("a chunk of {} tokens\n  allowed: up to {}", tokens.size(), options_.max_chunk_tokens));
  }
  Part part;
  part.view = {0, static_cast<std::int32_t>(tokens.size()), start, nullptr};
  part.reason = crossover_before_selection(options_.sparsity.crossover, part.view, options_.page_tokens);
  if (dense && part.reason != DenseReason::kFirstChunk) part.reason = DenseReason::kRequested;
  if (options_.sparsity.selector.name == "dense") part.reason = DenseReason::kSelector;
  return part;
}

Result<CudaSequence::Chunk> CudaSequence::begin_chunk(std::span<const std::span<const std::int32_t>> tokens,
                                                      bool dense) {
  Chunk chunk;
  chunk.dense = true;
  std::int32_t context = 0;  // the longest
  for (std::size_t b = 0; b < tokens.size(); ++b) {
    CA_ASSIGN_OR_RETURN(Part part, check_part(b, tokens[b], dense));
    part.view.q_begin = chunk.rows;
    chunk.rows += part.view.chunk_tokens;
    if (part.view.chunk_tokens > 0) {
      context = std::max(context, part.view.context_tokens());
      chunk.dense = chunk.dense && part.reason != DenseReason::kNone;
    }
    chunk.parts.push_back(part);
  }
  chunk.step = step_input(chunk.rows, context, chunk.dense);
  CA_ASSIGN_OR_RETURN(chunk.sizes, step_cuda_sizes(chunk.step));
  CA_RETURN_IF_ERROR(log_.begin_chunk(stream_));
  const Part& first = chunk.parts.front();  // the only one where a mirror is kept
  if (mirrors_ && first.reason != DenseReason::kRequested) {
    CA_RETURN_IF_ERROR(mirror_.begin_chunk(first.view.chunk_start, first.view.chunk_tokens));
  }

  // Copied by the driver before the call returns, so the host's memory is free again.
  std::vector<std::int32_t> input(tokens.size() * sizeof(CudaChunk) / 4);
  for (std::size_t b = 0; b < tokens.size(); ++b) {
    const ChunkView& view = chunk.parts[b].view;
    const CudaChunk fields{view.q_begin, view.chunk_tokens, view.chunk_start, static_cast<std::int32_t>(b)};
    std::memcpy(input.data() + b * sizeof(fields) / 4, &fields, sizeof(fields));
  }
  for (const std::span<const std::int32_t> of_request : tokens) {
    input.insert(input.end(), of_request.begin(), of_request.end());
  }
  CA_RETURN_IF_ERROR(
      cuda_status(cudaMemcpyAsync(input_.data(), input.data(), input.size() * 4, cudaMemcpyHostToDevice, stream_.get()),
                  "token ids"));
  CA_RETURN_IF_ERROR(
      rope_table_cuda(chunk.step, model_->inverse_frequencies(), config_->head_dim, rope_.as<float>(), stream_.get()));
  CA_RETURN_IF_ERROR(plan_step_cuda(chunk.step, errors_.as<std::int32_t>(), step_workspace_.data(),
                                    step_workspace_.bytes(), stream_.get()));
  return chunk;
}

Status CudaSequence::run_layer(const Chunk& chunk, std::int32_t layer, ThreadPool& pool) {
  const ModelConfig& c = *config_;
  const CudaBlock& block = model_->weights().blocks()[static_cast<std::size_t>(layer)];
  const std::int32_t q_width = c.num_attention_heads * c.head_dim;
  const std::int32_t kv_width = c.num_key_value_heads * c.head_dim;
  const auto eps = static_cast<float>(c.rms_norm_eps);
  const auto norm = [&](const float* weight) {
    return cuda_status(launch_rms_norm(residual_.as<Bf16Bits>(), weight, eps, chunk.rows, c.hidden_size,
                                       normed_.as<Bf16Bits>(), stream_.get()),
                       "norm");
  };
  CA_RETURN_IF_ERROR(norm(block.attention_norm));
  CA_RETURN_IF_ERROR(
      product(block.qkv, normed_, qkv_, q_width + 2 * kv_width, c.hidden_size, chunk.rows, Gemm::Output::kBf16));
  CA_RETURN_IF_ERROR(attend(chunk, layer, pool));
  CA_RETURN_IF_ERROR(
      product(block.o, attended_, residual_, c.hidden_size, q_width, chunk.rows, Gemm::Output::kBf16Accumulate));

  CA_RETURN_IF_ERROR(norm(block.mlp_norm));
  if (block.router != nullptr) {
    return experts_.add(block, normed_.as<Bf16Bits>(), chunk.rows, residual_.as<Bf16Bits>(), model_->gemm(),
                        gemm_workspace_.data(), stream_.get());
  }
  CA_RETURN_IF_ERROR(product(block.gate_up, normed_, gate_up_, 2 * c.intermediate_size, c.hidden_size, chunk.rows,
                             Gemm::Output::kBf16));
  CA_RETURN_IF_ERROR(cuda_status(launch_silu_multiply(gate_up_.as<Bf16Bits>(), chunk.rows, c.intermediate_size,
                                                      mlp_.as<Bf16Bits>(), stream_.get()),
                                 "activation"));
  return product(block.down, mlp_, residual_, c.hidden_size, c.intermediate_size, chunk.rows,
                 Gemm::Output::kBf16Accumulate);
}

Status CudaSequence::read_logits(const Chunk& chunk, LogitsOf logits_of, std::vector<float>& logits) {
  const ModelConfig& c = *config_;
  std::int32_t rows = 0;
  for (const Part& part : chunk.parts) {
    const ChunkView& view = part.view;
    if (view.chunk_tokens == 0) continue;
    const std::int32_t of_part = logits_of == LogitsOf::kLastToken ? 1 : view.chunk_tokens;
    const std::int64_t first_row = view.q_begin + view.chunk_tokens - of_part;
    CA_RETURN_IF_ERROR(cuda_status(
        launch_rms_norm(residual_.as<Bf16Bits>() + first_row * c.hidden_size, model_->weights().final_norm(),
                        static_cast<float>(c.rms_norm_eps), of_part, c.hidden_size,
                        normed_.as<Bf16Bits>() + std::int64_t{rows} * c.hidden_size, stream_.get()),
        "norm"));
    rows += of_part;
  }
  const std::int64_t bytes = std::int64_t{rows} * c.vocab_size * 4;
  CA_RETURN_IF_ERROR(grow(logits_, bytes, "logits"));
  CA_RETURN_IF_ERROR(
      product(model_->weights().lm_head(), normed_, logits_, c.vocab_size, c.hidden_size, rows, Gemm::Output::kF32));
  logits.resize(static_cast<std::size_t>(bytes) / 4);
  CA_RETURN_IF_ERROR(cuda_status(cudaMemcpyAsync(logits.data(), logits_.data(), static_cast<std::size_t>(bytes),
                                                 cudaMemcpyDeviceToHost, stream_.get()),
                                 "logits"));
  CA_RETURN_IF_ERROR(stream_.synchronize("the forward pass"));
  return check_device_errors();
}

Status CudaSequence::check_device_errors() {
  std::int32_t errors[2] = {};
  CA_RETURN_IF_ERROR(
      cuda_status(cudaMemcpy(errors, errors_.data(), sizeof(errors), cudaMemcpyDeviceToHost), "error codes"));
  if (errors[0] != 0) {
    return internal_error(
        fmt::format("the step on the GPU: {}", cuda_step_error_text(static_cast<CudaStepError>(errors[0]))));
  }
  if (errors[1] != 0) {
    return internal_error(
        fmt::format("attention on the GPU: {}", cuda_attention_error_text(static_cast<CudaAttentionError>(errors[1]))));
  }
  return {};
}

Result<std::vector<LayerReport>> CudaSequence::take_reports() {
  CA_ASSIGN_OR_RETURN(std::vector<LayerReport> reports, log_.take(stream_));
  CA_RETURN_IF_ERROR(check_device_errors());
  return reports;
}

Status CudaSequence::observe(AttentionObserver observer) {
  if (!mirrors_) {
    CA_ASSIGN_OR_RETURN(mirror_, HostMirror::create(*config_, options_, options_.extra));
    mirrors_ = true;
  }
  observer_ = std::move(observer);
  return {};
}

}  // namespace compact::engine
