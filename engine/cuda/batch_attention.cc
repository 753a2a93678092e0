// A layer's attention: append, selection on the device or by the CPU on a copy, union, lists, attention.
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "engine/cuda/batch.h"

namespace compact::engine {
namespace {

using Moment = LayerLog::Moment;

}  // namespace

CudaSelectInput CudaBatch::select_input(std::int32_t rows, std::int32_t layer) const noexcept {
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

CudaAttentionInput CudaBatch::attention_input(std::int32_t rows, std::int32_t layer,
                                              const Lists& lists) const noexcept {
  const ModelConfig& c = *config_;
  return {.q = qkv_.data(),
          .q_token_stride = std::int64_t{c.num_attention_heads + 2 * c.num_key_value_heads} * c.head_dim,
          .q_head_stride = c.head_dim,
          .num_q_tokens = rows,
          .num_q_heads = c.num_attention_heads,
          .kv = layer_view(layer),
          .units = lists.memory == nullptr ? nullptr : lists.memory->units.as<AttentionUnit>(),
          .num_units = lists.num_units,
          .page_ids = lists.memory == nullptr ? nullptr : lists.memory->page_ids.as<std::int32_t>(),
          .max_units = lists.max_units,
          .heads_per_unit = lists.heads_per_unit,
          .softmax_scale = softmax_scale(c)};
}

// Queries and keys normed and rotated, K and V into pages, and what selectors read beside them.
Status CudaBatch::append(const Step& step, std::int32_t layer) {
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
    CA_RETURN_IF_ERROR(append_cuda(step.all, normed, kv, nullptr, nullptr, stream_.get()));
    CA_RETURN_IF_ERROR(gate_pools_cuda(step.all, kv, summaries, stream_.get()));
    const std::size_t row_bytes = static_cast<std::size_t>(c.num_attention_heads * c.head_dim) * sizeof(Bf16Bits);
    CA_RETURN_IF_ERROR(cuda_status(
        cudaMemcpy2DAsync(q_pre_.data(), row_bytes, q, static_cast<std::size_t>(token_stride) * sizeof(Bf16Bits),
                          row_bytes, static_cast<std::size_t>(step.rows), cudaMemcpyDeviceToDevice, stream_.get()),
        "queries before RoPE"));
    append.q_norm = nullptr;
  }
  CA_RETURN_IF_ERROR(
      append_cuda(step.all, append, kv, summaries.mean_k, mean_tokens_.as<std::int32_t>(), stream_.get()));
  return page_summaries_cuda(step.all, kv, summaries, stream_.get());
}

Status CudaBatch::attend(const Step& step, std::int32_t layer, ThreadPool& pool) {
  CA_RETURN_IF_ERROR(log_.mark(layer, Moment::kAppend, stream_.get()));
  CA_RETURN_IF_ERROR(append(step, layer));
  if (mirrors_ && step.parts.front().reason != DenseReason::kRequested) {
    const CudaAttentionInput queries = attention_input(step.rows, layer, {});
    CA_RETURN_IF_ERROR(mirror_.copy_layer(layer, queries.q, queries.q_token_stride, queries.kv, stream_, pool));
    if (observer_) {
      CA_RETURN_IF_ERROR(
          observer_({layer, mirror_.chunk(), mirror_.q(), mirror_.cache(), softmax_scale(*config_), pool}));
    }
  }
  std::vector<Lists> all_lists;
  if (step.chosen.num_parts > 0) {
    CA_ASSIGN_OR_RETURN(all_lists.emplace_back(), choose_pages(step, layer, pool));
  }
  if (step.dense.num_parts > 0) {
    CA_ASSIGN_OR_RETURN(all_lists.emplace_back(), take_all_pages(step, layer));
  }
  CA_RETURN_IF_ERROR(log_.mark(layer, Moment::kAttend, stream_.get()));
  for (const Lists& lists : all_lists) CA_RETURN_IF_ERROR(attend_lists(step, layer, lists));
  CA_RETURN_IF_ERROR(log_.mark(layer, Moment::kEnd, stream_.get()));
  // Of one request: there are no other lists.
  return options_.sparsity.trace_pages ? trace(layer, all_lists.front()) : Status();
}

Status CudaBatch::attend_lists(const Step& step, std::int32_t layer, const Lists& lists) {
  const CudaAttentionOutput output{.o = attended_.data(),
                                   .o_token_stride = std::int64_t{config_->num_attention_heads} * config_->head_dim,
                                   .o_head_stride = config_->head_dim,
                                   .error = errors_.as<std::int32_t>() + 1};
  return attend_cuda(attention_input(step.rows, layer, lists), output, {}, attention_workspace_.data(),
                     attention_workspace_.bytes(), stream_.get());
}

// Lists of all pages are the same in every layer.
Result<CudaBatch::Lists> CudaBatch::take_all_pages(const Step& step, std::int32_t layer) {
  if (layer == 0) {
    if (step.chosen.num_parts == 0) CA_RETURN_IF_ERROR(log_.mark(layer, Moment::kUnite, stream_.get()));
    const CudaPageLists lists{dense_.units.as<AttentionUnit>(), dense_.num_units.as<std::int32_t>(),
                              dense_.page_ids.as<std::int32_t>(), dense_.stats.as<UnionStats>()};
    CA_RETURN_IF_ERROR(build_dense_lists_cuda(step.dense.step, lists, dense_.workspace.data(), dense_.workspace.bytes(),
                                              stream_.get()));
  }
  for (const Part& part : step.parts) {
    if (part.reason == DenseReason::kNone) continue;
    const std::int64_t row_pages = std::int64_t{part.view.chunk_tokens} * config_->num_attention_heads *
                                   part.view.num_past_pages(options_.page_tokens);
    const UnionStats all{row_pages, row_pages, row_pages};
    log_.count(layer, part.reason, &all);
  }
  return device_lists(dense_, step.dense.sizes);
}

Result<CudaBatch::Lists> CudaBatch::choose_pages(const Step& step, std::int32_t layer, ThreadPool& pool) {
  CA_RETURN_IF_ERROR(log_.mark(layer, Moment::kSelect, stream_.get()));
  if (host_selector_ != nullptr) return choose_on_host(layer, step, pool);
  const Group& group = step.chosen;
  CA_RETURN_IF_ERROR(select_cuda(group.step, select_input(step.rows, layer), mask_.as<std::uint64_t>(),
                                 log_.nonfinite_rows(layer), chosen_.workspace.data(), chosen_.workspace.bytes(),
                                 select_workspace_.data(), select_workspace_.bytes(), stream_.get()));
  CA_RETURN_IF_ERROR(log_.mark(layer, Moment::kUnite, stream_.get()));
  for (std::int32_t i = 0; i < group.num_parts; ++i) log_.count(layer, DenseReason::kNone, nullptr);
  const CudaPageLists lists{chosen_.units.as<AttentionUnit>(), chosen_.num_units.as<std::int32_t>(),
                            chosen_.page_ids.as<std::int32_t>(), log_.stats(layer, group.sizes.num_stats)};
  CA_RETURN_IF_ERROR(build_page_lists_cuda(group.step, mask_.as<std::uint64_t>(), lists, chosen_.workspace.data(),
                                           chosen_.workspace.bytes(), stream_.get()));
  return device_lists(chosen_, group.sizes);
}

// Selection and union by the CPU backend, on the copy of the cache; only the lists go back.
Result<CudaBatch::Lists> CudaBatch::choose_on_host(std::int32_t layer, const Step& step, ThreadPool& pool) {
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
  log_.count(layer, DenseReason::kNone, &host_lists_.chunk_stats.front());

  Lists lists;
  lists.memory = &chosen_;
  lists.max_units = static_cast<std::int32_t>(host_lists_.units.size());
  lists.heads_per_unit = host_lists_.heads_per_unit;
  const auto upload = [this](DeviceBuffer& buffer, const void* from, std::size_t bytes) -> Status {
    CA_RETURN_IF_ERROR(grow(buffer, static_cast<std::int64_t>(bytes), "page lists"));
    return cuda_status(cudaMemcpyAsync(buffer.data(), from, bytes, cudaMemcpyHostToDevice, stream_.get()),
                       "page lists");
  };
  CA_RETURN_IF_ERROR(upload(chosen_.units, host_lists_.units.data(), host_lists_.units.size() * sizeof(AttentionUnit)));
  CA_RETURN_IF_ERROR(
      upload(chosen_.page_ids, host_lists_.page_ids.data(), host_lists_.page_ids.size() * sizeof(std::int32_t)));
  CA_ASSIGN_OR_RETURN(const std::int64_t bytes,
                      attend_cuda_workspace_bytes(attention_input(step.rows, layer, lists), {}));
  CA_RETURN_IF_ERROR(grow(attention_workspace_, bytes, "the attention's workspace"));
  return lists;
}

// Physical pages are logical pages here: one request, and the first pages that are free are its.
Status CudaBatch::trace(std::int32_t layer, const Lists& lists) {
  CA_RETURN_IF_ERROR(stream_.synchronize("the page lists"));
  const auto read = [](void* to, const void* from, std::size_t bytes) {
    return cuda_status(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "the page lists");
  };
  std::int32_t num_units = lists.max_units;
  if (lists.num_units != nullptr) CA_RETURN_IF_ERROR(read(&num_units, lists.num_units, sizeof(num_units)));
  std::vector<AttentionUnit> units(static_cast<std::size_t>(num_units));
  CA_RETURN_IF_ERROR(read(units.data(), lists.memory->units.data(), units.size() * sizeof(AttentionUnit)));
  std::vector<std::vector<std::int32_t>> pages(static_cast<std::size_t>(config_->num_key_value_heads));
  for (const AttentionUnit& unit : units) {
    if (unit.q_len == 0) continue;
    std::vector<std::int32_t>& of_head = pages[static_cast<std::size_t>(unit.kv_head)];
    const auto before = of_head.size();
    of_head.resize(before +
                   static_cast<std::size_t>((unit.list_tokens + options_.page_tokens - 1) / options_.page_tokens));
    CA_RETURN_IF_ERROR(read(of_head.data() + before, lists.memory->page_ids.as<std::int32_t>() + unit.list_begin,
                            (of_head.size() - before) * 4));
  }
  for (std::vector<std::int32_t>& of_head : pages) {
    std::sort(of_head.begin(), of_head.end());
    of_head.erase(std::unique(of_head.begin(), of_head.end()), of_head.end());
  }
  log_.report(layer).traced_pages.push_back(std::move(pages));
  return {};
}

}  // namespace compact::engine
