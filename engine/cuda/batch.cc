// A chunk through the layers, from token ids to logits.
#include "engine/cuda/batch.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace compact::engine {
Status CudaBatch::product(const Bf16Bits* w, const DeviceBuffer& x, const DeviceBuffer& y, std::int32_t out,
                          std::int32_t in, std::int32_t rows, Gemm::Output output) {
  return model_->gemm().run(w, x.data(), y.data(), out, in, rows, output, gemm_workspace_.data(), stream_.get());
}

Status CudaBatch::forward(std::span<const BatchPart> parts, ThreadPool& pool, std::vector<float>& logits) {
  logits.clear();
  CA_RETURN_IF_ERROR(check_step(*config_, options_, tables_, parts));
  if (parts.empty()) return {};
  CA_ASSIGN_OR_RETURN(const Step step, begin_step(parts));
  const ModelConfig& c = *config_;
  CA_RETURN_IF_ERROR(cuda_status(launch_embed(token_ids(), model_->weights().embedding(), step.rows, c.hidden_size,
                                              residual_.as<Bf16Bits>(), stream_.get()),
                                 "embedding"));
  for (std::int32_t layer = 0; layer < c.num_hidden_layers; ++layer) {
    CA_RETURN_IF_ERROR(run_layer(step, layer, pool));
  }
  return read_logits(step, logits);
}

// Where a chunk stands, and why its attention is dense, if it is.
Result<CudaBatch::Part> CudaBatch::plan_part(const BatchPart& part) const {
  CA_ASSIGN_OR_RETURN(const std::int32_t start, tables_.length(part.request));
  Part planned{part.request, part.tokens, {}, DenseReason::kNone, part.logits};
  planned.view = {0, static_cast<std::int32_t>(part.tokens.size()), start, nullptr};
  planned.reason = crossover_before_selection(options_.sparsity.crossover, planned.view, options_.page_tokens);
  if (part.dense && planned.reason != DenseReason::kFirstChunk) planned.reason = DenseReason::kRequested;
  if (options_.sparsity.selector.name == "dense") planned.reason = DenseReason::kSelector;
  return planned;
}

// The parts by kind of list, and what these take.
Status CudaBatch::group_parts(Step& step) const {
  std::int32_t longest[2] = {0, 0};  // contexts of chosen, dense
  for (const Part& part : step.parts) {
    const bool dense = part.reason != DenseReason::kNone;
    ++(dense ? step.dense : step.chosen).num_parts;
    longest[dense] = std::max(longest[dense], part.view.context_tokens());
  }
  const auto num_parts = static_cast<std::int32_t>(step.parts.size());
  step.all = step_input(0, num_parts, step.rows, std::max(longest[0], longest[1]), false);
  if (step.chosen.num_parts > 0) {
    step.chosen.step = step_input(0, step.chosen.num_parts, step.rows, longest[0], false);
    CA_ASSIGN_OR_RETURN(step.chosen.sizes, step_cuda_sizes(step.chosen.step));
  }
  if (step.dense.num_parts > 0) {
    step.dense.step = step_input(step.chosen.num_parts, step.dense.num_parts, step.rows, longest[1], true);
    CA_ASSIGN_OR_RETURN(step.dense.sizes, step_cuda_sizes(step.dense.step));
  }
  return {};
}

Result<CudaBatch::Step> CudaBatch::begin_step(std::span<const BatchPart> parts) {
  Step step;
  for (const BatchPart& part : parts) {
    CA_ASSIGN_OR_RETURN(Part planned, plan_part(part));
    planned.view.q_begin = step.rows;
    step.rows += planned.view.chunk_tokens;
    step.parts.push_back(planned);
  }
  CA_RETURN_IF_ERROR(group_parts(step));
  const Part& first = step.parts.front();  // the only one where a mirror is kept
  if (mirrors_ && first.reason != DenseReason::kRequested) {
    CA_RETURN_IF_ERROR(mirror_.begin_chunk(first.view.chunk_start, first.view.chunk_tokens));
  }
  for (const Part& part : step.parts) {
    CA_RETURN_IF_ERROR(tables_.extend(part.request, part.view.chunk_tokens).status());
    CA_RETURN_IF_ERROR(upload_page_table(part.request));
  }
  CA_RETURN_IF_ERROR(upload_input(step));
  CA_RETURN_IF_ERROR(log_.begin_chunk(stream_));
  CA_RETURN_IF_ERROR(
      rope_table_cuda(step.all, model_->inverse_frequencies(), config_->head_dim, rope_.as<float>(), stream_.get()));
  for (const auto& [group, memory] : {std::pair(&step.chosen, &chosen_), std::pair(&step.dense, &dense_)}) {
    if (group->num_parts == 0) continue;
    CA_RETURN_IF_ERROR(plan_step_cuda(group->step, errors_.as<std::int32_t>(), memory->workspace.data(),
                                      memory->workspace.bytes(), stream_.get()));
  }
  return step;
}

// Copied by the driver before the call returns, so the host's memory is free again.
Status CudaBatch::upload_input(const Step& step) {
  std::vector<std::int32_t> input(static_cast<std::size_t>(options_.max_requests) * sizeof(CudaChunk) / 4);
  std::int32_t next[2] = {0, step.chosen.num_parts};  // of chosen, dense
  for (const Part& part : step.parts) {
    const ChunkView& view = part.view;
    const CudaChunk fields{view.q_begin, view.chunk_tokens, view.chunk_start, live_.at(part.request).table_row};
    const auto place = static_cast<std::size_t>(next[part.reason != DenseReason::kNone]++);
    std::memcpy(input.data() + place * sizeof(fields) / 4, &fields, sizeof(fields));
    input.insert(input.end(), part.tokens.begin(), part.tokens.end());
  }
  return cuda_status(
      cudaMemcpyAsync(input_.data(), input.data(), input.size() * 4, cudaMemcpyHostToDevice, stream_.get()),
      "token ids");
}

// The entries that the device does not have yet; the others never change.
Status CudaBatch::upload_page_table(RequestId request) {
  Live& live = live_.at(request);
  CA_ASSIGN_OR_RETURN(const std::span<const std::int32_t> pages, tables_.page_table(request));
  const auto fresh = pages.subspan(static_cast<std::size_t>(live.uploaded_pages));
  if (fresh.empty()) return {};
  std::int32_t* const row =
      page_table_.as<std::int32_t>() + std::int64_t{live.table_row} * options_.request_pages() + live.uploaded_pages;
  CA_RETURN_IF_ERROR(cuda_status(
      cudaMemcpyAsync(row, fresh.data(), fresh.size_bytes(), cudaMemcpyHostToDevice, stream_.get()), "a page table"));
  live.uploaded_pages = static_cast<std::int32_t>(pages.size());
  return {};
}

Result<RequestId> CudaBatch::add_request(std::span<const std::int32_t> prefix_pages) {
  CA_RETURN_IF_ERROR(check_new_request(options_, tables_, prefix_pages));
  if (mirrors_) {
    if (!prefix_pages.empty()) {
      return unsupported(
          "a prefix of pages where the CPU keeps a copy of the cache\n  allowed: a request from its first token");
    }
    mirror_.restart();
  }
  CA_ASSIGN_OR_RETURN(const RequestId request, tables_.add_request(prefix_pages));
  live_[request] = {free_rows_.back(), 0};
  free_rows_.pop_back();
  return request;
}

Status CudaBatch::release(RequestId request) {
  CA_RETURN_IF_ERROR(tables_.release(request));
  free_rows_.push_back(live_.at(request).table_row);
  live_.erase(request);
  return {};
}

Status CudaBatch::hold_page(std::int32_t page) {
  if (mirrors_) return unsupported("pages cannot outlive their request where the CPU keeps a copy of the cache");
  return tables_.hold(page);
}

Status CudaBatch::run_layer(const Step& step, std::int32_t layer, ThreadPool& pool) {
  const ModelConfig& c = *config_;
  const CudaBlock& block = model_->weights().blocks()[static_cast<std::size_t>(layer)];
  const std::int32_t q_width = c.num_attention_heads * c.head_dim;
  const std::int32_t kv_width = c.num_key_value_heads * c.head_dim;
  const auto eps = static_cast<float>(c.rms_norm_eps);
  const auto norm = [&](const float* weight) {
    return cuda_status(launch_rms_norm(residual_.as<Bf16Bits>(), weight, eps, step.rows, c.hidden_size,
                                       normed_.as<Bf16Bits>(), stream_.get()),
                       "norm");
  };
  CA_RETURN_IF_ERROR(norm(block.attention_norm));
  CA_RETURN_IF_ERROR(
      product(block.qkv, normed_, qkv_, q_width + 2 * kv_width, c.hidden_size, step.rows, Gemm::Output::kBf16));
  CA_RETURN_IF_ERROR(attend(step, layer, pool));
  CA_RETURN_IF_ERROR(
      product(block.o, attended_, residual_, c.hidden_size, q_width, step.rows, Gemm::Output::kBf16Accumulate));

  CA_RETURN_IF_ERROR(norm(block.mlp_norm));
  if (block.router != nullptr) {
    return experts_.add(block, normed_.as<Bf16Bits>(), step.rows, residual_.as<Bf16Bits>(), model_->gemm(),
                        gemm_workspace_.data(), stream_.get());
  }
  CA_RETURN_IF_ERROR(product(block.gate_up, normed_, gate_up_, 2 * c.intermediate_size, c.hidden_size, step.rows,
                             Gemm::Output::kBf16));
  CA_RETURN_IF_ERROR(cuda_status(
      launch_silu_multiply(gate_up_.as<Bf16Bits>(), step.rows, c.intermediate_size, mlp_.as<Bf16Bits>(), stream_.get()),
      "activation"));
  return product(block.down, mlp_, residual_, c.hidden_size, c.intermediate_size, step.rows,
                 Gemm::Output::kBf16Accumulate);
}

Status CudaBatch::read_logits(const Step& step, std::vector<float>& logits) {
  const ModelConfig& c = *config_;
  std::int32_t rows = 0;  // asked for
  for (std::size_t i = 0; i < step.parts.size();) {
    // Rows of neighbours that lie one behind the other, as those of decode steps do, are normed together.
    std::int64_t first_row = 0;
    std::int32_t run = 0;
    for (; i < step.parts.size(); ++i) {
      const Part& part = step.parts[i];
      if (part.logits == LogitsOf::kNone) {
        if (run > 0) break;
        continue;
      }
      const std::int32_t asked = part.logits == LogitsOf::kLastToken ? 1 : part.view.chunk_tokens;
      const std::int64_t first = part.view.q_begin + part.view.chunk_tokens - asked;
      if (run > 0 && first != first_row + run) break;
      if (run == 0) first_row = first;
      run += asked;
    }
    if (run == 0) break;
    CA_RETURN_IF_ERROR(cuda_status(
        launch_rms_norm(residual_.as<Bf16Bits>() + first_row * c.hidden_size, model_->weights().final_norm(),
                        static_cast<float>(c.rms_norm_eps), run, c.hidden_size,
                        normed_.as<Bf16Bits>() + std::int64_t{rows} * c.hidden_size, stream_.get()),
        "norm"));
    rows += run;
  }
  if (rows == 0) return {};
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

Status CudaBatch::check_device_errors() {
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

Result<std::vector<LayerReport>> CudaBatch::take_reports() {
  CA_ASSIGN_OR_RETURN(std::vector<LayerReport> reports, log_.take(stream_));
  CA_RETURN_IF_ERROR(check_device_errors());
  return reports;
}

Status CudaBatch::observe(AttentionObserver observer) {
  if (!mirrors_) {
    CA_ASSIGN_OR_RETURN(mirror_, HostMirror::create(*config_, options_, options_.extra));
    mirrors_ = true;
  }
  observer_ = std::move(observer);
  return {};
}

}  // namespace compact::engine
