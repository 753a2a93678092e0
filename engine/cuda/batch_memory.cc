// What a batch keeps on the device: caches, records, workspaces, and views of them.
#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "engine/cuda/batch.h"

namespace compact::engine {
namespace {

// A dense chunk is one unit per KV head that reads every page: the same lists for all layers.
UnionOptions dense_union(std::int32_t group) {
  UnionOptions options;
  options.heads_per_unit = group;
  return options;
}

}  // namespace

Result<std::unique_ptr<Batch>> CudaBatch::create(const CudaTransformer& model, const BatchOptions& options) {
  CA_RETURN_IF_ERROR(check_backend_options(Backend::kCuda, options.kv_dtype));
  CA_RETURN_IF_ERROR(check_batch_options(options));
  if (options.max_requests > 1 && (!selects_on_gpu(options.sparsity) || options.sparsity.trace_pages)) {
    return unsupported(fmt::format("a batch of {} requests {}\n  allowed: one request", options.max_requests,
                                   options.sparsity.trace_pages
                                       ? std::string("whose pages are traced")
                                       : fmt::format("with selector {}, which runs on the CPU with these options",
                                                     options.sparsity.selector.name)));
  }
  CA_ASSIGN_OR_RETURN(PageTables tables, PageTables::create(options.num_pages, options.page_tokens));
  CA_ASSIGN_OR_RETURN(Stream stream, Stream::create());
  std::unique_ptr<CudaBatch> batch(new CudaBatch(model, options, std::move(stream), std::move(tables)));
  CA_RETURN_IF_ERROR(batch->allocate());
  return std::unique_ptr<Batch>(std::move(batch));
}

// A buffer of at least `bytes`; what it held is lost if it has to grow.
Status CudaBatch::grow(DeviceBuffer& buffer, std::int64_t bytes, std::string_view what) {
  if (buffer.bytes() >= bytes) return {};
  CA_RETURN_IF_ERROR(stream_.synchronize(what));
  buffer = DeviceBuffer();
  CA_ASSIGN_OR_RETURN(buffer, DeviceBuffer::create(bytes, what));
  return {};
}

// Everything that a step can need, from the longest one on the longest contexts: forward allocates only logits.
Status CudaBatch::allocate() {
  const ModelConfig& c = *config_;
  const BatchOptions& o = options_;
  const std::int64_t rows = o.max_step_tokens;
  const std::int64_t page_elements = std::int64_t{c.num_key_value_heads} * o.page_tokens * c.head_dim;
  const std::int64_t q_width = std::int64_t{c.num_attention_heads} * c.head_dim;
  const std::int64_t kv_width = std::int64_t{c.num_key_value_heads} * c.head_dim;
  CA_ASSIGN_OR_RETURN(std::unique_ptr<Selector> selector, make_selector(o.sparsity.selector));
  SummaryFields kept = selector->needs().summaries;  // on the device
  if (selects_on_gpu(o.sparsity)) {
    CA_ASSIGN_OR_RETURN(
        mask_shape_, cuda_mask_shape(o.sparsity.selector, c.num_attention_heads, c.num_key_value_heads, o.page_tokens));
  } else {
    CA_ASSIGN_OR_RETURN(mirror_, HostMirror::create(c, o, either(kept, o.extra)));
    host_selector_ = std::move(selector);
    mirrors_ = true;
    kept = {};
  }
  const auto take = [](DeviceBuffer& buffer, std::int64_t bytes, std::string_view what) -> Status {
    CA_ASSIGN_OR_RETURN(buffer, DeviceBuffer::create(bytes, what));
    return {};
  };
  const std::string cache = fmt::format("a KV cache of {} tokens", std::int64_t{o.num_pages} * o.page_tokens);
  const std::int64_t records = std::int64_t{c.num_hidden_layers} * o.num_pages;
  CA_RETURN_IF_ERROR(take(kv_, 2 * 2 * records * page_elements, cache));
  if (kept.mean_k) CA_RETURN_IF_ERROR(take(mean_k_, 2 * kv_width * records, "page means"));
  if (kept.sub_mean_k) {
    const std::int32_t granules = o.page_tokens / granule_tokens(o.page_tokens);
    CA_RETURN_IF_ERROR(take(sub_mean_k_, 2 * kv_width * granules * records, "means of granules"));
  }
  if (kept.norm_k) {
    const std::int64_t page_keys = std::int64_t{c.num_key_value_heads} * o.page_tokens;
    CA_RETURN_IF_ERROR(take(norm_k_, 4 * page_keys * records, "key norms"));
  }
  if (kept.gate_pool) {
    const std::int64_t sums = kv_width * (o.page_tokens / kGateBlockTokens) * records;
    CA_RETURN_IF_ERROR(take(gate_pool_, 3 * 4 * sums, "gate pools"));
    CA_RETURN_IF_ERROR(take(gate_sum_, 4 * sums, "gate pools"));
    CA_RETURN_IF_ERROR(take(q_pre_, rows * q_width * 2, "activations"));
  }
  CA_RETURN_IF_ERROR(take(mean_tokens_, std::int64_t{o.num_pages} * 4, "page means"));
  CA_RETURN_IF_ERROR(take(page_table_, std::int64_t{o.max_requests} * o.request_pages() * 4, "page tables"));
  CA_RETURN_IF_ERROR(take(input_, o.max_requests * std::int64_t{sizeof(CudaChunk)} + rows * 4, "token ids"));
  CA_RETURN_IF_ERROR(take(rope_, rows * c.head_dim * 4, "rotation angles"));
  CA_RETURN_IF_ERROR(take(residual_, rows * c.hidden_size * 2, "activations"));
  CA_RETURN_IF_ERROR(take(normed_, rows * c.hidden_size * 2, "activations"));
  CA_RETURN_IF_ERROR(take(qkv_, rows * (q_width + 2 * kv_width) * 2, "activations"));
  CA_RETURN_IF_ERROR(take(attended_, rows * q_width * 2, "activations"));
  CA_RETURN_IF_ERROR(take(gate_up_, rows * c.intermediate_size * 4, "activations"));
  CA_RETURN_IF_ERROR(take(mlp_, rows * c.intermediate_size * 2, "activations"));
  if (c.experts.num_experts > 0) {
    CA_ASSIGN_OR_RETURN(experts_, CudaExperts::create(c, o.max_step_tokens));
  }

  const auto context = static_cast<std::int32_t>(
      std::min<std::int64_t>(c.max_position_embeddings, std::int64_t{o.request_pages()} * o.page_tokens));
  const CudaStepInput chosen_step = step_input(0, o.max_requests, o.max_step_tokens, context, false);
  CA_ASSIGN_OR_RETURN(const CudaStepSizes chosen, step_cuda_sizes(chosen_step));
  CA_ASSIGN_OR_RETURN(const CudaStepSizes dense,
                      step_cuda_sizes(step_input(0, o.max_requests, o.max_step_tokens, context, true)));
  CA_RETURN_IF_ERROR(take(errors_, 8, "error codes"));
  CA_RETURN_IF_ERROR(take(mask_, chosen.mask_words * 8, "page masks"));
  CA_RETURN_IF_ERROR(take(dense_.stats, dense.num_stats * std::int64_t{sizeof(UnionStats)}, "union sums"));
  CA_RETURN_IF_ERROR(take(gemm_workspace_, Gemm::kWorkspaceBytes, "the products' workspace"));
  std::int64_t attention_bytes = 0;
  for (const auto& [memory, sizes] : {std::pair(&chosen_, &chosen), std::pair(&dense_, &dense)}) {
    CA_RETURN_IF_ERROR(take(memory->units, sizes->max_units * std::int64_t{sizeof(AttentionUnit)}, "attention units"));
    CA_RETURN_IF_ERROR(take(memory->num_units, 4, "attention units"));
    CA_RETURN_IF_ERROR(take(memory->page_ids, sizes->num_list_entries * 4, "page lists"));
    CA_RETURN_IF_ERROR(take(memory->workspace, sizes->workspace_bytes, "the step's workspace"));
    CA_ASSIGN_OR_RETURN(
        const std::int64_t bytes,
        attend_cuda_workspace_bytes(attention_input(o.max_step_tokens, 0, device_lists(*memory, *sizes)), {}));
    attention_bytes = std::max(attention_bytes, bytes);
  }
  CA_RETURN_IF_ERROR(take(attention_workspace_, attention_bytes, "the attention's workspace"));
  CA_ASSIGN_OR_RETURN(log_, LayerLog::create(c.num_hidden_layers, chosen.num_stats, stream_));
  if (host_selector_ == nullptr) CA_RETURN_IF_ERROR(prepare_selection(chosen_step));

  for (std::int32_t row = o.max_requests; row-- > 0;) free_rows_.push_back(row);
  for (const DeviceBuffer* buffer : {&mean_tokens_, &errors_}) {
    CA_RETURN_IF_ERROR(
        cuda_status(cudaMemsetAsync(buffer->data(), 0, static_cast<std::size_t>(buffer->bytes()), stream_.get()),
                    "clearing memory"));
  }
  return stream_.synchronize("clearing memory");
}

// What a selection on the GPU takes: thresholds per head, gates, and scores of the longest step on the longest
// contexts.
Status CudaBatch::prepare_selection(const CudaStepInput& longest) {
  const HeadThresholds& table = options_.sparsity.selector.thresholds;
  if (!table.empty()) {
    if (table.num_layers != config_->num_hidden_layers || table.num_heads != mask_shape_.mask_heads) {
      return invalid_argument(
          fmt::format("thresholds for {} layers x {} heads\n  allowed: {} x {}, the model's layers "
                      "and the heads of the selector's mask",
                      table.num_layers, table.num_heads, config_->num_hidden_layers, mask_shape_.mask_heads));
    }
    const std::size_t bytes = table.values.size() * sizeof(float);
    CA_ASSIGN_OR_RETURN(thresholds_, DeviceBuffer::create(static_cast<std::int64_t>(bytes), "thresholds"));
    CA_RETURN_IF_ERROR(
        cuda_status(cudaMemcpy(thresholds_.data(), table.values.data(), bytes, cudaMemcpyHostToDevice), "thresholds"));
  }
  if (gate_pool_.bytes() > 0) {
    const GateWeights& gates = *options_.sparsity.selector.seer.gates;
    if (gates.num_layers != config_->num_hidden_layers) {
      return invalid_argument(
          fmt::format("gates of {} layers\n  allowed: {}, the model's", gates.num_layers, config_->num_hidden_layers));
    }
    std::vector<float> all = gates.key;
    all.insert(all.end(), gates.query.begin(), gates.query.end());
    all.insert(all.end(), gates.inverse_frequencies.begin(), gates.inverse_frequencies.end());
    const std::size_t bytes = all.size() * sizeof(float);
    CA_ASSIGN_OR_RETURN(gates_, DeviceBuffer::create(static_cast<std::int64_t>(bytes), "gates"));
    CA_RETURN_IF_ERROR(cuda_status(cudaMemcpy(gates_.data(), all.data(), bytes, cudaMemcpyHostToDevice), "gates"));
  }
  CA_ASSIGN_OR_RETURN(const std::int64_t bytes, select_cuda_bytes(longest, select_input(longest.num_q_tokens, 0)));
  CA_ASSIGN_OR_RETURN(select_workspace_, DeviceBuffer::create(bytes, "scores of pages"));
  return {};
}

CudaStepInput CudaBatch::step_input(std::int32_t first_chunk, std::int32_t num_chunks, std::int32_t rows,
                                    std::int32_t context_tokens, bool dense) const {
  const ModelConfig& c = *config_;
  return {.chunks = input_.as<CudaChunk>() + first_chunk,
          .page_tables = page_table_.as<std::int32_t>(),
          .mean_tokens = dense || kept_bytes() == 0 ? nullptr : mean_tokens_.as<std::int32_t>(),
          .page_table_stride = options_.request_pages(),
          .num_table_rows = options_.max_requests,
          .num_chunks = num_chunks,
          .num_q_tokens = rows,
          .max_context_tokens = context_tokens,
          .num_q_heads = c.num_attention_heads,
          .num_kv_heads = c.num_key_value_heads,
          .page_tokens = options_.page_tokens,
          .num_pages = options_.num_pages,
          .mask_heads = dense ? 0 : mask_shape_.mask_heads,
          .block_tokens = dense ? 0 : mask_shape_.block_tokens,
          .forced = options_.sparsity.forced,
          .options = dense ? dense_union(c.num_attention_heads / c.num_key_value_heads) : options_.sparsity.unite};
}

PagedKvView CudaBatch::layer_view(std::int32_t layer) const noexcept {
  const ModelConfig& c = *config_;
  const std::int64_t head_stride = std::int64_t{options_.page_tokens} * c.head_dim;
  const std::int64_t page_stride = c.num_key_value_heads * head_stride;
  auto* const k = kv_.as<Bf16Bits>() + 2 * std::int64_t{layer} * options_.num_pages * page_stride;
  return {.k = k,
          .v = k + options_.num_pages * page_stride,
          .dtype = DType::kBF16,
          .num_pages = options_.num_pages,
          .num_kv_heads = c.num_key_value_heads,
          .page_tokens = options_.page_tokens,
          .head_dim = c.head_dim,
          .page_stride = page_stride,
          .head_stride = head_stride,
          .token_stride = c.head_dim};
}

CudaPageSummaries CudaBatch::layer_summaries(std::int32_t layer) const noexcept {
  const auto at = [&](const DeviceBuffer& buffer) -> char* {  // every layer has as many bytes
    return buffer.bytes() == 0 ? nullptr : buffer.as<char>() + buffer.bytes() / config_->num_hidden_layers * layer;
  };
  return {.mean_k = at(mean_k_),
          .sub_mean_k = at(sub_mean_k_),
          .norm_k = reinterpret_cast<float*>(at(norm_k_)),
          .gate_pool = reinterpret_cast<float*>(at(gate_pool_)),
          .gate_sum = reinterpret_cast<float*>(at(gate_sum_))};
}

// Those of the mirror too: they are kept for the selector or an observer, wherever they lie.
std::int64_t CudaBatch::summary_bytes() const noexcept {
  return kept_bytes() + (mirrors_ ? mirror_.cache().summary_bytes() : 0);
}

}  // namespace compact::engine
