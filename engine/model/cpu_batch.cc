#include "engine/model/cpu_batch.h"

namespace compact::engine {

Result<std::unique_ptr<Batch>> CpuBatch::create(const Transformer& model, const BatchOptions& options) {
  const ModelConfig& config = model.config();
  CA_RETURN_IF_ERROR(check_batch_options(options));
  CA_ASSIGN_OR_RETURN(ChunkAttention attention,
                      ChunkAttention::create(options.sparsity, config.num_hidden_layers, config.num_attention_heads,
                                             config.num_key_value_heads, softmax_scale(config)));
  const PagedKvOptions cache_options{config.num_hidden_layers, config.num_key_value_heads,
                                     config.head_dim,          options.page_tokens,
                                     options.num_pages,        options.kv_dtype,
                                     KvLayout::kHnd,           either(attention.needs().summaries, options.extra)};
  CA_ASSIGN_OR_RETURN(PagedKvCache cache, PagedKvCache::create(cache_options));
  return std::unique_ptr<Batch>(new CpuBatch(model, options, std::move(cache), std::move(attention)));
}

Result<RequestId> CpuBatch::add_request(std::span<const std::int32_t> prefix_pages) {
  CA_RETURN_IF_ERROR(check_new_request(options_, cache_.tables(), prefix_pages));
  return cache_.add_request(prefix_pages);
}

Status CpuBatch::forward(std::span<const BatchPart> parts, ThreadPool& pool, std::vector<float>& logits) {
  logits.clear();
  CA_RETURN_IF_ERROR(check_step(model_->config(), options_, cache_.tables(), parts));
  if (parts.empty()) return {};
  return model_->forward(parts, cache_, attention_, pool, logits);
}

}  // namespace compact::engine
