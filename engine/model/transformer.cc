#include "engine/model/transformer.h"

#include <fmt/format.h>

#include <string>
#include <utility>

#include "compact/attention.h"
#include "engine/loader/rope_frequencies.h"
#include "engine/model/cpu_sequence.h"
#include "engine/model/layers.h"

namespace compact::engine {
namespace {

Result<Linear> load_linear(const Checkpoint& checkpoint, const std::string& name, std::int64_t out, std::int64_t in) {
  CA_ASSIGN_OR_RETURN(const TensorRef tensor, checkpoint.tensor(name, {out, in}));
  return Linear(tensor);
}

Result<std::vector<float>> load_vector(const Checkpoint& checkpoint, const std::string& name, std::int64_t size) {
  CA_ASSIGN_OR_RETURN(const TensorRef tensor, checkpoint.tensor(name, {size}));
  std::vector<float> values(static_cast<std::size_t>(size));
  widen_to_f32(tensor, 0, size, values.data());
  return values;
}

}  // namespace

Result<Transformer> Transformer::load(const std::filesystem::path& directory) {
  CA_ASSIGN_OR_RETURN(ModelConfig config, load_model_config(directory));
  CA_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::open(directory));
  Transformer model(std::move(checkpoint));
  model.config_ = std::move(config);
  CA_RETURN_IF_ERROR(model.load_weights());
  model.inverse_frequencies_ = rope_inverse_frequencies(model.config_);
  return model;
}

Status Transformer::load_weights() {
  const std::int64_t hidden = config_.hidden_size;
  const std::int64_t dim = config_.head_dim;
  const std::int64_t q_width = config_.num_attention_heads * dim;
  const std::int64_t kv_width = config_.num_key_value_heads * dim;
  const std::int64_t mlp_width = config_.intermediate_size;

  CA_ASSIGN_OR_RETURN(embedding_, load_linear(checkpoint_, "model.embed_tokens.weight", config_.vocab_size, hidden));
  blocks_.resize(static_cast<std::size_t>(config_.num_hidden_layers));
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    Block& block = blocks_[i];
    const std::string prefix = fmt::format("model.layers.{}.", i);
    const auto linear = [&](const char* name, std::int64_t out, std::int64_t in) {
      return load_linear(checkpoint_, fmt::format("{}{}.weight", prefix, name), out, in);
    };
    const auto vector = [&](const char* name, std::int64_t size) {
      return load_vector(checkpoint_, fmt::format("{}{}.weight", prefix, name), size);
    };
    CA_ASSIGN_OR_RETURN(block.attention_norm, vector("input_layernorm", hidden));
    CA_ASSIGN_OR_RETURN(block.q_proj, linear("self_attn.q_proj", q_width, hidden));
    CA_ASSIGN_OR_RETURN(block.k_proj, linear("self_attn.k_proj", kv_width, hidden));
    CA_ASSIGN_OR_RETURN(block.v_proj, linear("self_attn.v_proj", kv_width, hidden));
    CA_ASSIGN_OR_RETURN(block.o_proj, linear("self_attn.o_proj", hidden, q_width));
    if (config_.qk_norm) {
      CA_ASSIGN_OR_RETURN(block.q_norm, vector("self_attn.q_norm", dim));
      CA_ASSIGN_OR_RETURN(block.k_norm, vector("self_attn.k_norm", dim));
    }
    CA_ASSIGN_OR_RETURN(block.mlp_norm, vector("post_attention_layernorm", hidden));
    if (config_.has_experts(static_cast<std::int32_t>(i))) {
      CA_ASSIGN_OR_RETURN(block.experts, load_experts(prefix));
      continue;
    }
    CA_ASSIGN_OR_RETURN(block.gate_proj, linear("mlp.gate_proj", mlp_width, hidden));
    CA_ASSIGN_OR_RETURN(block.up_proj, linear("mlp.up_proj", mlp_width, hidden));
    CA_ASSIGN_OR_RETURN(block.down_proj, linear("mlp.down_proj", hidden, mlp_width));
  }
  CA_ASSIGN_OR_RETURN(final_norm_, load_vector(checkpoint_, "model.norm.weight", hidden));
  if (config_.tie_word_embeddings) {
    lm_head_ = embedding_;
  } else {
    CA_ASSIGN_OR_RETURN(lm_head_, load_linear(checkpoint_, "lm_head.weight", config_.vocab_size, hidden));
  }
  return {};
}

Result<ExpertMlp> Transformer::load_experts(const std::string& prefix) const {
  const std::int64_t hidden = config_.hidden_size;
  const std::int64_t width = config_.experts.intermediate_size;
  CA_ASSIGN_OR_RETURN(const Linear router,
                      load_linear(checkpoint_, prefix + "mlp.gate.weight", config_.experts.num_experts, hidden));
  std::vector<ExpertMlp::Expert> experts(static_cast<std::size_t>(config_.experts.num_experts));
  for (std::size_t e = 0; e < experts.size(); ++e) {
    const auto linear = [&](const char* name, std::int64_t out, std::int64_t in) {
      return load_linear(checkpoint_, fmt::format("{}mlp.experts.{}.{}.weight", prefix, e, name), out, in);
    };
    CA_ASSIGN_OR_RETURN(experts[e].gate, linear("gate_proj", width, hidden));
    CA_ASSIGN_OR_RETURN(experts[e].up, linear("up_proj", width, hidden));
    CA_ASSIGN_OR_RETURN(experts[e].down, linear("down_proj", hidden, width));
  }
  return ExpertMlp(config_.experts, router, std::move(experts));
}

std::string Transformer::processor() const { return cpu_attention_target(); }

Result<std::unique_ptr<Sequence>> Transformer::start(const SequenceOptions& options) const {
  return CpuSequence::create(*this, options);
}

Result<std::unique_ptr<Batch>> Transformer::start_batch(std::int32_t num_requests, const SequenceOptions&) const {
  return unsupported(fmt::format(
      "a batch of {} requests is not on the cpu backend yet\n  allowed: one request, or --backend cuda", num_requests));
}

Status Transformer::forward(std::span<const std::int32_t> tokens, RequestId request, bool dense, LogitsOf logits_of,
                            PagedKvCache& cache, ChunkAttention& attention, ThreadPool& pool,
                            std::vector<float>& logits) const {
  logits.clear();
  if (tokens.empty()) return {};
  const auto rows = static_cast<std::int32_t>(tokens.size());            // C
  CA_ASSIGN_OR_RETURN(const std::int32_t start, cache.length(request));  // S
  CA_RETURN_IF_ERROR(check_chunk(config_, tokens, start));
  CA_RETURN_IF_ERROR(cache.extend(request, rows));
  CA_ASSIGN_OR_RETURN(const std::span<const std::int32_t> page_table, cache.page_table(request));
  const ChunkView chunk{0, rows, start, page_table.data()};

  const std::int32_t hidden = config_.hidden_size;
  const std::int32_t dim = config_.head_dim;
  const std::int32_t q_heads = config_.num_attention_heads;
  const std::int32_t kv_heads = config_.num_key_value_heads;
  const auto eps = static_cast<float>(config_.rms_norm_eps);
  const auto buffer = [rows](std::int32_t width) {
    return std::vector<float>(static_cast<std::size_t>(rows) * static_cast<std::size_t>(width));
  };
  std::vector<float> residual = buffer(hidden);         // [C, hidden]
  std::vector<float> normed = buffer(hidden);           // [C, hidden]
  std::vector<float> q = buffer(q_heads * dim);         // [C, Hq, D]
  std::vector<float> k = buffer(kv_heads * dim);        // [C, Hkv, D]
  std::vector<float> v = buffer(kv_heads * dim);        // [C, Hkv, D]
  std::vector<float> attended = buffer(q_heads * dim);  // [C, Hq, D]
  // Before RoPE, for gates; copied only if the cache pools them.
  const bool keep_pre = cache.options().summaries.gate_pool;
  std::vector<float> q_pre;  // [C, Hq, D]
  std::vector<float> k_pre;  // [C, Hkv, D]
  PreRope pre;
  std::vector<float> gate = buffer(config_.intermediate_size);
  std::vector<float> up = buffer(config_.intermediate_size);
  const RopeTable rope = make_rope_table(inverse_frequencies_, start, rows);

  for (std::int32_t t = 0; t < rows; ++t) {
    embedding_.row(tokens[static_cast<std::size_t>(t)], residual.data() + std::int64_t{t} * hidden);
  }
  for (std::int32_t layer = 0; layer < config_.num_hidden_layers; ++layer) {
    const Block& block = blocks_[static_cast<std::size_t>(layer)];

    rms_norm(residual.data(), block.attention_norm.data(), eps, rows, hidden, normed.data(), pool);
    block.q_proj.apply(normed.data(), rows, q.data(), false, pool);
    block.k_proj.apply(normed.data(), rows, k.data(), false, pool);
    block.v_proj.apply(normed.data(), rows, v.data(), false, pool);
    if (config_.qk_norm) {  // Qwen3: every head of q and k is normed on its own, before the rotation
      rms_norm(q.data(), block.q_norm.data(), eps, rows * q_heads, dim, q.data(), pool);
      rms_norm(k.data(), block.k_norm.data(), eps, rows * kv_heads, dim, k.data(), pool);
    }
    if (keep_pre) {
      q_pre = q;
      k_pre = k;
      pre = {contiguous_rows<const float>(q_pre.data(), rows, q_heads, dim),
             contiguous_rows<const float>(k_pre.data(), rows, kv_heads, dim)};
    }
    apply_rope(rope, contiguous_rows(q.data(), rows, q_heads, dim), pool);
    apply_rope(rope, contiguous_rows(k.data(), rows, kv_heads, dim), pool);
    CA_RETURN_IF_ERROR(attention.run(layer, request, chunk, contiguous_rows<const float>(q.data(), rows, q_heads, dim),
                                     contiguous_rows<const float>(k.data(), rows, kv_heads, dim),
                                     contiguous_rows<const float>(v.data(), rows, kv_heads, dim), dense, cache,
                                     contiguous_rows(attended.data(), rows, q_heads, dim), pool, pre));
    block.o_proj.apply(attended.data(), rows, residual.data(), true, pool);

    rms_norm(residual.data(), block.mlp_norm.data(), eps, rows, hidden, normed.data(), pool);
    if (config_.has_experts(layer)) {
      block.experts.add(normed.data(), rows, residual.data(), pool);
      continue;
    }
    block.gate_proj.apply(normed.data(), rows, gate.data(), false, pool);
    block.up_proj.apply(normed.data(), rows, up.data(), false, pool);
    silu_multiply(gate.data(), up.data(), rows, config_.intermediate_size, pool);
    block.down_proj.apply(gate.data(), rows, residual.data(), true, pool);
  }

  if (logits_of == LogitsOf::kNone) return {};
  const std::int32_t first_row = logits_of == LogitsOf::kLastToken ? rows - 1 : 0;
  const std::int32_t logit_rows = rows - first_row;
  rms_norm(residual.data() + std::int64_t{first_row} * hidden, final_norm_.data(), eps, logit_rows, hidden,
           normed.data(), pool);
  logits.resize(static_cast<std::size_t>(logit_rows) * static_cast<std::size_t>(config_.vocab_size));
  lm_head_.apply(normed.data(), logit_rows, logits.data(), false, pool);
  return {};
}

}  // namespace compact::engine
