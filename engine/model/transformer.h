/// The forward pass of Llama-3.x and Qwen3 (dense and mixture of experts) on the CPU, in chunks over a paged KV cache.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "compact/paged_kv.h"
#include "compact/status.h"
#include "compact/thread_pool.h"
#include "engine/loader/checkpoint.h"
#include "engine/loader/model_config.h"
#include "engine/model/chunk_attention.h"
#include "engine/model/experts.h"
#include "engine/model/linear.h"
#include "engine/model/model.h"

namespace compact::engine {

class Transformer final : public Model {
 public:
  /// Reads config.json and maps the weights of a Hugging Face model directory.
  /// Errors: those of load_model_config and Checkpoint: each names the file, tensor or key, the value seen, what is
  /// allowed.
  [[nodiscard]] static Result<Transformer> load(const std::filesystem::path& directory);

  [[nodiscard]] const ModelConfig& config() const noexcept override { return config_; }
  [[nodiscard]] std::int64_t weight_bytes() const noexcept override { return checkpoint_.weight_bytes(); }
  [[nodiscard]] Backend backend() const noexcept override { return Backend::kCpu; }
  [[nodiscard]] std::string processor() const override;
  [[nodiscard]] Result<std::unique_ptr<Batch>> start(const BatchOptions& options) const override;

  /// Runs the next chunks of some requests through every layer. The cache is extended by them, and a chunk starts at
  /// its request's former length. A row has the bits of a forward of its part alone, whatever stands beside it.
  /// logits: [rows asked for by the parts, in their order, vocab_size]. Precondition: check_step.
  /// Errors: those of the cache and of ChunkAttention.
  [[nodiscard]] Status forward(std::span<const BatchPart> parts, PagedKvCache& cache, ChunkAttention& attention,
                               ThreadPool& pool, std::vector<float>& logits) const;

 private:
  struct Block {
    std::vector<float> attention_norm;     // [hidden]
    Linear q_proj, k_proj, v_proj;         // [Hq D, hidden], [Hkv D, hidden], [Hkv D, hidden]
    std::vector<float> q_norm, k_norm;     // [D]; empty without qk_norm
    Linear o_proj;                         // [hidden, Hq D]
    std::vector<float> mlp_norm;           // [hidden]
    Linear gate_proj, up_proj, down_proj;  // of a layer without experts
    ExpertMlp experts;                     // of a layer with experts
  };

  explicit Transformer(Checkpoint checkpoint) : checkpoint_(std::move(checkpoint)) {}
  [[nodiscard]] Status load_weights();
  [[nodiscard]] Result<ExpertMlp> load_experts(const std::string& prefix) const;

  ModelConfig config_;
  Checkpoint checkpoint_;
  Linear embedding_;                        // [vocab, hidden]
  std::vector<Block> blocks_;               // [num_hidden_layers]
  std::vector<float> final_norm_;           // [hidden]
  Linear lm_head_;                          // [vocab, hidden]; the embedding when tied
  std::vector<float> inverse_frequencies_;  // [D/2]
};

}  // namespace compact::engine
