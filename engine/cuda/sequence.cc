#include "engine/cuda/sequence.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

namespace compact::engine {
namespace {

using Moment = LayerLog::Moment;

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
