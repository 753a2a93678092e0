// A layer's attention: append, selection on the device or by the CPU on a copy, union, lists, attention.
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "engine/cuda/sequence.h"

namespace compact::engine {
namespace {

using Moment = LayerLog::Moment;

}  // namespace

CudaSelectInput CudaSequence::select_input(std::int32_t rows, std::int32_t layer) const noexcept {
  const CudaAttentionInput queries = attention_input(rows, layer, {});
  const float* const thresholds =
      thresholds_.bytes() == 0 ? nullptr : thresholds_.as<float>() + std::int64_t{layer} * mask_shape_.mask_heads;
  CudaGates gates;
  if (gates_.bytes() > 0) {
    const GateWeights& host = *options_.sparsity.selector.seer.gates;
    const auto keys = std::ssize(host.key), from_queries = std::ssize(host.query);
    const auto* const all = gates_.as<float>();
    gates.key = all + keys / host.num_layers * layer;
    gates.query = host.query.empty() ? nullptr : all + keys + from_queries / host.num_layers * layer;
    gates.inverse_frequencies = all + keys + from_queries;
  }
  return {.options = &options_.sparsity.selector,
          .q = queries.q,
          .q_token_stride = queries.q_token_stride,
          .q_head_stride = queries.q_head_stride,
          .dtype = queries.kv.dtype,
          .head_dim = config_->head_dim,
          .softmax_scale = queries.softmax_scale,
          .kv = queries.kv,
          .summaries = layer_summaries(layer),
          .q_pre = q_pre_.data(),
          .q_pre_token_stride = std::int64_t{config_->num_attention_heads} * config_->head_dim,
          .q_pre_head_stride = config_->head_dim,
          .gates = gates,
          .layer = layer,
          .head_thresholds = thresholds};
}

CudaAttentionInput CudaSequence::attention_input(std::int32_t rows, std::int32_t layer,
                                                 const Lists& lists) const noexcept {
  const ModelConfig& c = *config_;
  return {.q = qkv_.data(),
          .q_token_stride = std::int64_t{c.num_attention_heads + 2 * c.num_key_value_heads} * c.head_dim,
          .q_head_stride = c.head_dim,
          .num_q_tokens = rows,
          .num_q_heads = c.num_attention_heads,
          .kv = layer_view(layer),
          .units = units_.as<AttentionUnit>(),
          .num_units = lists.num_units,
          .page_ids = page_ids_.as<std::int32_t>(),
          .max_units = lists.max_units,
          .heads_per_unit = lists.heads_per_unit,
          .softmax_scale = softmax_scale(c)};
}

// Queries and keys normed and rotated, K and V into pages, and what selectors read beside them.
Status CudaSequence::append(const Chunk& chunk, std::int32_t layer) {
  const ModelConfig& c = *config_;
  const CudaBlock& block = model_->weights().blocks()[static_cast<std::size_t>(layer)];
  const PagedKvView kv = layer_view(layer);
  const CudaPageSummaries summaries = layer_summaries(layer);
  auto* const q = qkv_.as<Bf16Bits>();  // [C, Hq + 2 Hkv, D]
  auto* const k = q + std::int64_t{c.num_attention_heads} * c.head_dim;
  auto* const v = k + std::int64_t{c.num_key_value_heads} * c.head_dim;
  const std::int64_t token_stride = std::int64_t{c.num_attention_heads + 2 * c.num_key_value_heads} * c.head_dim;
  CudaAppendInput append{.q = q,
                         .q_token_stride = token_stride,
                         .q_head_stride = c.head_dim,
                         .k = k,
                         .k_token_stride = token_stride,
                         .k_head_stride = c.head_dim,
                         .v = v,
                         .v_token_stride = token_stride,
                         .v_head_stride = c.head_dim,
                         .rope_table = rope_.as<float>(),
                         .q_norm = block.q_norm,
                         .k_norm = block.k_norm,
                         .norm_eps = static_cast<float>(c.rms_norm_eps)};
  if (summaries.gate_pool != nullptr) {
    // Gates read both before RoPE: keys lie in the pages for a moment as normed, queries are normed for good.
    CudaAppendInput normed = append;
    normed.rope_table = nullptr;
    CA_RETURN_IF_ERROR(append_cuda(chunk.step, normed, kv, nullptr, nullptr, stream_.get()));
    CA_RETURN_IF_ERROR(gate_pools_cuda(chunk.step, kv, summaries, stream_.get()));
    const std::size_t row_bytes = static_cast<std::size_t>(c.num_attention_heads * c.head_dim) * sizeof(Bf16Bits);
    CA_RETURN_IF_ERROR(cuda_status(
        cudaMemcpy2DAsync(q_pre_.data(), row_bytes, q, static_cast<std::size_t>(token_stride) * sizeof(Bf16Bits),
                          row_bytes, static_cast<std::size_t>(chunk.rows), cudaMemcpyDeviceToDevice, stream_.get()),
        "queries before RoPE"));
    append.q_norm = nullptr;
  }
  CA_RETURN_IF_ERROR(
      append_cuda(chunk.step, append, kv, summaries.mean_k, mean_tokens_.as<std::int32_t>(), stream_.get()));
  return page_summaries_cuda(chunk.step, kv, summaries, stream_.get());
}

Status CudaSequence::attend(const Chunk& chunk, std::int32_t layer, ThreadPool& pool) {
  const ModelConfig& c = *config_;
  const PagedKvView kv = layer_view(layer);
  const CudaAttentionInput queries = attention_input(chunk.rows, layer, {});
  CA_RETURN_IF_ERROR(log_.mark(layer, Moment::kAppend, stream_.get()));
  CA_RETURN_IF_ERROR(append(chunk, layer));
  if (mirrors_ && chunk.parts.front().reason != DenseReason::kRequested) {
    CA_RETURN_IF_ERROR(mirror_.copy_layer(layer, queries.q, queries.q_token_stride, kv, stream_, pool));
    if (observer_) {
      CA_RETURN_IF_ERROR(observer_({layer, mirror_.chunk(), mirror_.q(), mirror_.cache(), softmax_scale(c), pool}));
    }
  }
  CA_ASSIGN_OR_RETURN(const Lists lists, choose_pages(chunk, layer, pool));
  CA_RETURN_IF_ERROR(log_.mark(layer, Moment::kAttend, stream_.get()));
  const CudaAttentionOutput output{.o = attended_.data(),
                                   .o_token_stride = std::int64_t{c.num_attention_heads} * c.head_dim,
                                   .o_head_stride = c.head_dim,
                                   .error = errors_.as<std::int32_t>() + 1};
  CA_RETURN_IF_ERROR(attend_cuda(attention_input(chunk.rows, layer, lists), output, {}, attention_workspace_.data(),
                                 attention_workspace_.bytes(), stream_.get()));
  CA_RETURN_IF_ERROR(log_.mark(layer, Moment::kEnd, stream_.get()));
  return options_.sparsity.trace_pages ? trace(layer, lists) : Status();
}

// In a chunk of which parts are dense their rows of the mask get all bits, whatever was selected.
Status CudaSequence::keep_all_pages_of_dense_parts(const Chunk& chunk) {
  const std::int32_t block_tokens = chunk.sizes.block_tokens;
  const std::size_t row_bytes = static_cast<std::size_t>(chunk.sizes.words_per_row) * sizeof(std::uint64_t);
  const std::size_t head_bytes = static_cast<std::size_t>(chunk.sizes.max_blocks) * row_bytes;
  std::int32_t block = 0;
  for (const Part& part : chunk.parts) {
    if (part.view.chunk_tokens == 0) continue;
    // Edges of blocks lie at absolute multiples.
    const std::int32_t num_blocks =
        (part.view.context_tokens() + block_tokens - 1) / block_tokens - part.view.chunk_start / block_tokens;
    if (part.reason != DenseReason::kNone && row_bytes > 0) {
      CA_RETURN_IF_ERROR(
          cuda_status(cudaMemset2DAsync(mask_.as<char>() + static_cast<std::size_t>(block) * row_bytes, head_bytes,
                                        0xff, static_cast<std::size_t>(num_blocks) * row_bytes,
                                        static_cast<std::size_t>(mask_shape_.mask_heads), stream_.get()),
                      "page masks"));
    }
    block += num_blocks;
  }
  return {};
}

Status CudaSequence::unite(const Chunk& chunk, const DeviceBuffer& mask, UnionStats* stats) {
  const CudaPageLists lists{units_.as<AttentionUnit>(), num_units_.as<std::int32_t>(), page_ids_.as<std::int32_t>(),
                            stats};
  return build_page_lists_cuda(chunk.step, mask.as<std::uint64_t>(), lists, step_workspace_.data(),
                               step_workspace_.bytes(), stream_.get());
}

Result<CudaSequence::Lists> CudaSequence::choose_pages(const Chunk& chunk, std::int32_t layer, ThreadPool& pool) {
  if (chunk.dense) {
    if (layer == 0) {
      CA_RETURN_IF_ERROR(log_.mark(layer, Moment::kUnite, stream_.get()));
      CA_RETURN_IF_ERROR(unite(chunk, all_pages_, dense_stats_.as<UnionStats>()));
    }
    for (const Part& part : chunk.parts) {
      if (part.view.chunk_tokens == 0) continue;
      const std::int64_t row_pages = std::int64_t{part.view.chunk_tokens} * config_->num_attention_heads *
                                     part.view.num_past_pages(options_.page_tokens);
      const UnionStats all{row_pages, row_pages, row_pages};
      log_.count(layer, part.reason, &all);
    }
    return device_lists(chunk.sizes);
  }
  CA_RETURN_IF_ERROR(log_.mark(layer, Moment::kSelect, stream_.get()));
  if (host_selector_ != nullptr) return choose_on_host(chunk, layer, pool);
  CA_RETURN_IF_ERROR(select_cuda(chunk.step, select_input(chunk.rows, layer), mask_.as<std::uint64_t>(),
                                 log_.nonfinite_rows(layer), step_workspace_.data(), step_workspace_.bytes(),
                                 select_workspace_.data(), select_workspace_.bytes(), stream_.get()));
  CA_RETURN_IF_ERROR(keep_all_pages_of_dense_parts(chunk));
  CA_RETURN_IF_ERROR(log_.mark(layer, Moment::kUnite, stream_.get()));
  for (const Part& part : chunk.parts) {
    if (part.view.chunk_tokens > 0) log_.count(layer, part.reason, nullptr);
  }
  CA_RETURN_IF_ERROR(unite(chunk, mask_, log_.stats(layer)));
  return device_lists(chunk.sizes);
}

// Selection and union by the CPU backend, on the copy of the cache; only the lists go back.
Result<CudaSequence::Lists> CudaSequence::choose_on_host(const Chunk& chunk, std::int32_t layer, ThreadPool& pool) {
  const PagedKvCache& cache = mirror_.cache();
  const std::span<const ChunkView> chunks(&mirror_.chunk(), 1);
  const SelectInput input{chunks,
                          mirror_.q(),
                          cache.summaries(layer),
                          options_.page_tokens,
                          softmax_scale(*config_),
                          cache.layer(layer),
                          layer,
                          options_.sparsity.forced};
  CA_RETURN_IF_ERROR(host_selector_->select(input, host_mask_, pool));
  CA_RETURN_IF_ERROR(log_.mark(layer, Moment::kUnite, stream_.get()));
  UnionInput union_input;
  union_input.chunks = chunks;
  union_input.num_q_heads = config_->num_attention_heads;
  union_input.num_kv_heads = config_->num_key_value_heads;
  union_input.page_tokens = options_.page_tokens;
  union_input.num_physical_pages = options_.num_pages;
  union_input.forced = options_.sparsity.forced;
  union_input.options = options_.sparsity.unite;
  CA_RETURN_IF_ERROR(build_page_lists(union_input, host_mask_, host_lists_, pool));
  LayerReport& report = log_.report(layer);
  report.selected_on_host = true;
  report.nonfinite_rows += host_mask_.nonfinite_rows;
  log_.count(layer, chunk.parts.front().reason, &host_lists_.chunk_stats.front());

  Lists lists;
  lists.max_units = static_cast<std::int32_t>(host_lists_.units.size());
  lists.heads_per_unit = host_lists_.heads_per_unit;
  const auto upload = [this](DeviceBuffer& buffer, const void* from, std::size_t bytes) -> Status {
    CA_RETURN_IF_ERROR(grow(buffer, static_cast<std::int64_t>(bytes), "page lists"));
    return cuda_status(cudaMemcpyAsync(buffer.data(), from, bytes, cudaMemcpyHostToDevice, stream_.get()),
                       "page lists");
  };
  CA_RETURN_IF_ERROR(upload(units_, host_lists_.units.data(), host_lists_.units.size() * sizeof(AttentionUnit)));
  CA_RETURN_IF_ERROR(
      upload(page_ids_, host_lists_.page_ids.data(), host_lists_.page_ids.size() * sizeof(std::int32_t)));
  CA_ASSIGN_OR_RETURN(const std::int64_t bytes,
                      attend_cuda_workspace_bytes(attention_input(chunk.rows, layer, lists), {}));
  CA_RETURN_IF_ERROR(grow(attention_workspace_, bytes, "the attention's workspace"));
  return lists;
}

// Physical pages are logical pages here.
Status CudaSequence::trace(std::int32_t layer, const Lists& lists) {
  CA_RETURN_IF_ERROR(stream_.synchronize("the page lists"));
  const auto read = [](void* to, const void* from, std::size_t bytes) {
    return cuda_status(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "the page lists");
  };
  std::int32_t num_units = lists.max_units;
  if (lists.num_units != nullptr) CA_RETURN_IF_ERROR(read(&num_units, lists.num_units, sizeof(num_units)));
  std::vector<AttentionUnit> units(static_cast<std::size_t>(num_units));
  CA_RETURN_IF_ERROR(read(units.data(), units_.data(), units.size() * sizeof(AttentionUnit)));
  std::vector<std::vector<std::int32_t>> pages(static_cast<std::size_t>(config_->num_key_value_heads));
  for (const AttentionUnit& unit : units) {
    if (unit.q_len == 0) continue;
    std::vector<std::int32_t>& of_head = pages[static_cast<std::size_t>(unit.kv_head)];
    const auto before = of_head.size();
    of_head.resize(before +
                   static_cast<std::size_t>((unit.list_tokens + options_.page_tokens - 1) / options_.page_tokens));
    CA_RETURN_IF_ERROR(
        read(of_head.data() + before, page_ids_.as<std::int32_t>() + unit.list_begin, (of_head.size() - before) * 4));
  }
  for (std::vector<std::int32_t>& of_head : pages) {
    std::sort(of_head.begin(), of_head.end());
    of_head.erase(std::unique(of_head.begin(), of_head.end()), of_head.end());
  }
  log_.report(layer).traced_pages.push_back(std::move(pages));
  return {};
}

}  // namespace compact::engine
