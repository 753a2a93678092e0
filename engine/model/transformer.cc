#include "engine/model/transformer.h"

#include <fmt/format.h>

#include <string>
#include <utility>

#include "compact/attention.h"
#include "engine/loader/rope_frequencies.h"
#include "engine/model/cpu_batch.h"
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

Result<std::unique_ptr<Batch>> Transformer::start(const BatchOptions& options) const {
  return CpuBatch::create(*this, options);
}

Status Transformer::forward(std::span<const BatchPart> parts, PagedKvCache& cache, ChunkAttention& attention,
                            ThreadPool& pool, std::vector<float>& logits) const {
  logits.clear();
  std::vector<std::int32_t> part_rows;  // [parts]
  std::vector<std::int32_t> starts;     // [parts] S
  std::vector<std::int32_t> positions;  // [C] of all parts together
  for (const BatchPart& part : parts) {
    CA_ASSIGN_OR_RETURN(const std::int32_t start, cache.length(part.request));
    part_rows.push_back(static_cast<std::int32_t>(part.tokens.size()));
    starts.push_back(start);
    CA_RETURN_IF_ERROR(cache.extend(part.request, part_rows.back()));
    for (std::int32_t t = 0; t < part_rows.back(); ++t) positions.push_back(start + t);
  }
  const auto rows = static_cast<std::int32_t>(positions.size());  // C

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
  std::vector<float> gate = buffer(config_.intermediate_size);
  std::vector<float> up = buffer(config_.intermediate_size);
  const RopeTable rope = make_rope_table(inverse_frequencies_, positions);
  const auto product = [&](const Linear& linear, const std::vector<float>& x, std::vector<float>& y, bool accumulate) {
    linear.apply_parts(x.data(), part_rows, y.data(), accumulate, pool);
  };
  // visit(i, first row of part i)
  const auto for_each_part = [&](auto&& visit) -> Status {
    std::int32_t first_row = 0;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      CA_RETURN_IF_ERROR(visit(i, first_row));
      first_row += part_rows[i];
    }
    return {};
  };

  std::int64_t row = 0;
  for (const BatchPart& part : parts) {
    for (const std::int32_t token : part.tokens) embedding_.row(token, residual.data() + row++ * hidden);
  }
  for (std::int32_t layer = 0; layer < config_.num_hidden_layers; ++layer) {
    const Block& block = blocks_[static_cast<std::size_t>(layer)];

    rms_norm(residual.data(), block.attention_norm.data(), eps, rows, hidden, normed.data(), pool);
    product(block.q_proj, normed, q, false);
    product(block.k_proj, normed, k, false);
    product(block.v_proj, normed, v, false);
    if (config_.qk_norm) {  // Qwen3: every head of q and k is normed on its own, before the rotation
      rms_norm(q.data(), block.q_norm.data(), eps, rows * q_heads, dim, q.data(), pool);
      rms_norm(k.data(), block.k_norm.data(), eps, rows * kv_heads, dim, k.data(), pool);
    }
    if (keep_pre) {
      q_pre = q;
      k_pre = k;
    }
    apply_rope(rope, contiguous_rows(q.data(), rows, q_heads, dim), pool);
    apply_rope(rope, contiguous_rows(k.data(), rows, kv_heads, dim), pool);
    CA_RETURN_IF_ERROR(for_each_part([&](std::size_t i, std::int32_t first_row) -> Status {
      CA_ASSIGN_OR_RETURN(const std::span<const std::int32_t> page_table, cache.page_table(parts[i].request));
      const ChunkView chunk{0, part_rows[i], starts[i], page_table.data()};
      const auto of_part = [&](const std::vector<float>& all, std::int32_t heads) {
        if (all.empty()) return ConstRows{};
        return contiguous_rows<const float>(all.data() + std::int64_t{first_row} * heads * dim, part_rows[i], heads,
                                            dim);
      };
      const MutableRows o =
          contiguous_rows(attended.data() + std::int64_t{first_row} * q_heads * dim, part_rows[i], q_heads, dim);
      return attention.run(layer, parts[i].request, chunk, of_part(q, q_heads), of_part(k, kv_heads),
                           of_part(v, kv_heads), parts[i].dense, cache, o, pool,
                           {of_part(q_pre, q_heads), of_part(k_pre, kv_heads)});
    }));
    product(block.o_proj, attended, residual, true);

    rms_norm(residual.data(), block.mlp_norm.data(), eps, rows, hidden, normed.data(), pool);
    if (config_.has_experts(layer)) {
      CA_RETURN_IF_ERROR(for_each_part([&](std::size_t i, std::int32_t first_row) -> Status {
        const std::int64_t begin = std::int64_t{first_row} * hidden;
        block.experts.add(normed.data() + begin, part_rows[i], residual.data() + begin, pool);
        return {};
      }));
      continue;
    }
    product(block.gate_proj, normed, gate, false);
    product(block.up_proj, normed, up, false);
    silu_multiply(gate.data(), up.data(), rows, config_.intermediate_size, pool);
    product(block.down_proj, gate, residual, true);
  }

  std::vector<std::int32_t> logit_rows;  // of the parts that ask for some
  std::int32_t num_logits = 0;
  CA_RETURN_IF_ERROR(for_each_part([&](std::size_t i, std::int32_t first_row) -> Status {
    if (parts[i].logits == LogitsOf::kNone) return {};
    const std::int32_t asked = parts[i].logits == LogitsOf::kLastToken ? 1 : part_rows[i];
    rms_norm(residual.data() + std::int64_t{first_row + part_rows[i] - asked} * hidden, final_norm_.data(), eps, asked,
             hidden, normed.data() + std::int64_t{num_logits} * hidden, pool);
    logit_rows.push_back(asked);
    num_logits += asked;
    return {};
  }));
  if (num_logits == 0) return {};
  logits.resize(static_cast<std::size_t>(num_logits) * static_cast<std::size_t>(config_.vocab_size));
  lm_head_.apply_parts(normed.data(), logit_rows, logits.data(), false, pool);
  return {};
}

}  // namespace compact::engine
