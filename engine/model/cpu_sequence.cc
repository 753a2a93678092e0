#include "engine/model/cpu_sequence.h"

namespace compact::engine {
Result<std::unique_ptr<Sequence>> CpuSequence::create(const Transformer& model, const SequenceOptions& options) {
  const ModelConfig& config = model.config();
  CA_ASSIGN_OR_RETURN(ChunkAttention attention,
                      ChunkAttention::create(options.sparsity, config.num_hidden_layers, config.num_attention_heads,
                                             config.num_key_value_heads, model.softmax_scale()));
  const PagedKvOptions cache_options{config.num_hidden_layers, config.num_key_value_heads,
                                     config.head_dim,          options.page_tokens,
                                     options.num_pages,        options.kv_dtype,
                                     KvLayout::kHnd,           either(attention.needs().summaries, options.extra)};
  CA_ASSIGN_OR_RETURN(PagedKvCache cache, PagedKvCache::create(cache_options));
  return std::unique_ptr<Sequence>(new CpuSequence(model, std::move(cache), std::move(attention)));
}

}  // namespace compact::engine
