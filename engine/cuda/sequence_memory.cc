// What a sequence keeps on the device: caches, records, workspaces, and views of them.
#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "engine/cuda/sequence.h"

namespace compact::engine {
namespace {

// A dense chunk is one unit per KV head that reads every page: the same lists for all layers.
UnionOptions dense_union(std::int32_t group) {
  UnionOptions options;
  options.heads_per_unit = group;
  return options;
}

}  // namespace

Result<std::unique_ptr<CudaSequence>> CudaSequence::create(const CudaTransformer& model, std::int32_t num_requests,
                                                           const SequenceOptions& options) {
  CA_RETURN_IF_ERROR(check_backend_options(Backend::kCuda, options.kv_dtype));
  if (options.num_pages < 1 || options.max_chunk_tokens < 1) {
    return invalid_argument(fmt::format("a cache of {} pages and chunks of {} tokens\n  allowed: 1 or more of both",
                                        options.num_pages, options.max_chunk_tokens));
  }
  constexpr std::int64_t kMost = INT32_MAX / 2;
  if (num_requests < 1 || std::int64_t{num_requests} * std::max(options.num_pages, options.max_chunk_tokens) > kMost) {
    return invalid_argument(fmt::format(
        "{} requests of {} pages and chunks of {} tokens\n  allowed: 1 request or more, {} pages and tokens "
        "of a chunk in all",
        num_requests, options.num_pages, options.max_chunk_tokens, kMost));
  }
  if (num_requests > 1 && (!selects_on_gpu(options.sparsity) || options.sparsity.trace_pages)) {
    return unsupported(fmt::format("a batch of {} requests {}\n  allowed: one request", num_requests,
                                   options.sparsity.trace_pages
                                       ? std::string("whose pages are traced")
                                       : fmt::format("with selector {}, which runs on the CPU with these options",
                                                     options.sparsity.selector.name)));
  }
  CA_ASSIGN_OR_RETURN(Stream stream, Stream::create());
  std::unique_ptr<CudaSequence> sequence(new CudaSequence(model, num_requests, options, std::move(stream)));
  CA_RETURN_IF_ERROR(sequence->allocate());
  return sequence;
}

// A buffer of at least `bytes`; what it held is lost if it has to grow.
Status CudaSequence::grow(DeviceBuffer& buffer, std::int64_t bytes, std::string_view what) {
  if (buffer.bytes() >= bytes) return {};
  CA_RETURN_IF_ERROR(stream_.synchronize(what));
  buffer = DeviceBuffer();
  CA_ASSIGN_OR_RETURN(buffer, DeviceBuffer::create(bytes, what));
  return {};
}

// Everything that a chunk can need, from the longest chunk on the longest context: forward allocates only logits.
Status CudaSequence::allocate() {
  const ModelConfig& c = *config_;
  const SequenceOptions& o = options_;
  const std::int64_t rows = max_rows_;
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
  const std::string cache = fmt::format("{} of {} tokens", num_requests_ == 1 ? "a KV cache" : "KV caches",
                                        std::int64_t{num_pages_} * o.page_tokens);
  const std::int64_t records = std::int64_t{c.num_hidden_layers} * num_pages_;
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
  CA_RETURN_IF_ERROR(take(mean_tokens_, std::int64_t{num_pages_} * 4, "page means"));
  CA_RETURN_IF_ERROR(take(page_table_, std::int64_t{num_pages_} * 4, "a page table"));
  CA_RETURN_IF_ERROR(take(input_, num_requests_ * std::int64_t{sizeof(CudaChunk)} + rows * 4, "token ids"));
  CA_RETURN_IF_ERROR(take(rope_, rows * c.head_dim * 4, "rotation angles"));
  CA_RETURN_IF_ERROR(take(residual_, rows * c.hidden_size * 2, "activations"));
  CA_RETURN_IF_ERROR(take(normed_, rows * c.hidden_size * 2, "activations"));
  CA_RETURN_IF_ERROR(take(qkv_, rows * (q_width + 2 * kv_width) * 2, "activations"));
  CA_RETURN_IF_ERROR(take(attended_, rows * q_width * 2, "activations"));
  CA_RETURN_IF_ERROR(take(gate_up_, rows * c.intermediate_size * 4, "activations"));
  CA_RETURN_IF_ERROR(take(mlp_, rows * c.intermediate_size * 2, "activations"));
  if (c.experts.num_experts > 0) {
    CA_ASSIGN_OR_RETURN(experts_, CudaExperts::create(c, max_rows_));
  }

  const auto context = static_cast<std::int32_t>(
      std::min<std::int64_t>(c.max_position_embeddings, std::int64_t{o.num_pages} * o.page_tokens));
  CA_ASSIGN_OR_RETURN(const CudaStepSizes sparse, step_cuda_sizes(step_input(max_rows_, context, false)));
  CA_ASSIGN_OR_RETURN(const CudaStepSizes dense, step_cuda_sizes(step_input(max_rows_, context, true)));
  const auto most = [&](auto CudaStepSizes::*field) {
    return std::max(static_cast<std::int64_t>(sparse.*field), static_cast<std::int64_t>(dense.*field));
  };
  CA_RETURN_IF_ERROR(take(errors_, 8, "error codes"));
  CA_RETURN_IF_ERROR(take(mask_, sparse.mask_words * 8, "page masks"));
  CA_RETURN_IF_ERROR(take(all_pages_, dense.mask_words * 8, "page masks"));
  CA_RETURN_IF_ERROR(
      take(units_, most(&CudaStepSizes::max_units) * std::int64_t{sizeof(AttentionUnit)}, "attention units"));
  CA_RETURN_IF_ERROR(take(num_units_, 4, "attention units"));
  CA_RETURN_IF_ERROR(take(page_ids_, most(&CudaStepSizes::num_list_entries) * 4, "page lists"));
  CA_RETURN_IF_ERROR(take(dense_stats_, dense.num_stats * std::int64_t{sizeof(UnionStats)}, "union sums"));
  CA_RETURN_IF_ERROR(take(step_workspace_, most(&CudaStepSizes::workspace_bytes), "the step's workspace"));
  CA_RETURN_IF_ERROR(take(gemm_workspace_, Gemm::kWorkspaceBytes, "the products' workspace"));
  std::int64_t attention_bytes = 0;
  for (const CudaStepSizes& sizes : {sparse, dense}) {
    CA_ASSIGN_OR_RETURN(const std::int64_t bytes,
                        attend_cuda_workspace_bytes(attention_input(max_rows_, 0, device_lists(sizes)), {}));
    attention_bytes = std::max(attention_bytes, bytes);
  }
  CA_RETURN_IF_ERROR(take(attention_workspace_, attention_bytes, "the attention's workspace"));
  CA_ASSIGN_OR_RETURN(log_, LayerLog::create(c.num_hidden_layers, sparse.num_stats, stream_));
  if (host_selector_ == nullptr) CA_RETURN_IF_ERROR(prepare_selection(context));

  std::vector<std::int32_t> pages(static_cast<std::size_t>(num_pages_));
  std::iota(pages.begin(), pages.end(), 0);
  const auto set = [this](const DeviceBuffer& buffer, int byte) {
    return cuda_status(cudaMemsetAsync(buffer.data(), byte, static_cast<std::size_t>(buffer.bytes()), stream_.get()),
                       "clearing memory");
  };
  CA_RETURN_IF_ERROR(set(mean_tokens_, 0));
  CA_RETURN_IF_ERROR(set(errors_, 0));
  CA_RETURN_IF_ERROR(set(all_pages_, 0xff));
  CA_RETURN_IF_ERROR(cuda_status(
      cudaMemcpyAsync(page_table_.data(), pages.data(), pages.size() * 4, cudaMemcpyHostToDevice, stream_.get()),
      "a page table"));
  return stream_.synchronize("clearing memory");
}

// What a selection on the GPU takes: thresholds per head, gates, and scores of the longest chunk on the longest
// context.
Status CudaSequence::prepare_selection(std::int32_t context) {
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
  CA_ASSIGN_OR_RETURN(const std::int64_t bytes,
                      select_cuda_bytes(step_input(max_rows_, context, false), select_input(max_rows_, 0)));
  CA_ASSIGN_OR_RETURN(select_workspace_, DeviceBuffer::create(bytes, "scores of pages"));
  return {};
}

CudaStepInput CudaSequence::step_input(std::int32_t rows, std::int32_t context_tokens, bool dense) const {
  const ModelConfig& c = *config_;
  return {.chunks = input_.as<CudaChunk>(),
          .page_tables = page_table_.as<std::int32_t>(),
          .mean_tokens = dense || kept_bytes() == 0 ? nullptr : mean_tokens_.as<std::int32_t>(),
          .page_table_stride = options_.num_pages,
          .num_table_rows = num_requests_,
          .num_chunks = num_requests_,
          .num_q_tokens = rows,
          .max_context_tokens = context_tokens,
          .num_q_heads = c.num_attention_heads,
          .num_kv_heads = c.num_key_value_heads,
          .page_tokens = options_.page_tokens,
          .num_pages = num_pages_,
          .mask_heads = dense ? 0 : mask_shape_.mask_heads,
          .block_tokens = dense ? 0 : mask_shape_.block_tokens,
          .forced = options_.sparsity.forced,
          .options = dense ? dense_union(c.num_attention_heads / c.num_key_value_heads) : options_.sparsity.unite};
}

PagedKvView CudaSequence::layer_view(std::int32_t layer) const noexcept {
  const ModelConfig& c = *config_;
  const std::int64_t head_stride = std::int64_t{options_.page_tokens} * c.head_dim;
  const std::int64_t page_stride = c.num_key_value_heads * head_stride;
  auto* const k = kv_.as<Bf16Bits>() + 2 * std::int64_t{layer} * num_pages_ * page_stride;
  return {.k = k,
          .v = k + num_pages_ * page_stride,
          .dtype = DType::kBF16,
          .num_pages = num_pages_,
          .num_kv_heads = c.num_key_value_heads,
          .page_tokens = options_.page_tokens,
          .head_dim = c.head_dim,
          .page_stride = page_stride,
          .head_stride = head_stride,
          .token_stride = c.head_dim};
}

CudaPageSummaries CudaSequence::layer_summaries(std::int32_t layer) const noexcept {
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
std::int64_t CudaSequence::summary_bytes() const noexcept {
  return kept_bytes() + (mirrors_ ? mirror_.cache().summary_bytes() : 0);
}

}  // namespace compact::engine
