/// A request on one GPU, or several that advance together: caches, activations and the forward pass of their chunks,
/// queued on a stream of their own.
///
/// A chunk is queued without waiting for the device: append -> [select -> lists] -> attend per layer, between products
/// and norms. The host waits where it reads: for logits, for reports, while pages are traced for a picture, and in
/// every layer if a selector has no CUDA twin or somebody observes (host_mirror.h).
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "compact/append_cuda.h"
#include "compact/attention_cuda.h"
#include "compact/select_cuda.h"
#include "compact/step_cuda.h"
#include "engine/cuda/device.h"
#include "engine/cuda/experts.h"
#include "engine/cuda/host_mirror.h"
#include "engine/cuda/layer_log.h"
#include "engine/cuda/transformer.h"
#include "engine/model/model.h"

namespace compact::engine {

class CudaSequence final : public Sequence, public Batch {
 public:
  [[nodiscard]] static Result<std::unique_ptr<CudaSequence>> create(const CudaTransformer& model,
                                                                    std::int32_t num_requests,
                                                                    const SequenceOptions& options);

  [[nodiscard]] Status forward(std::span<const std::int32_t> tokens, bool dense, LogitsOf logits_of, ThreadPool& pool,
                               std::vector<float>& logits) override {
    return forward(std::span(&tokens, 1), dense, logits_of, pool, logits);
  }
  [[nodiscard]] Status forward(std::span<const std::span<const std::int32_t>> tokens, bool dense, LogitsOf logits_of,
                               ThreadPool& pool, std::vector<float>& logits) override;
  [[nodiscard]] Result<std::vector<LayerReport>> take_reports() override;
  [[nodiscard]] Status observe(AttentionObserver observer) override;
  [[nodiscard]] std::int64_t kv_bytes() const noexcept override { return kv_.bytes(); }
  [[nodiscard]] std::int64_t summary_bytes() const noexcept override;

 private:
  /// A request's part of a chunk.
  struct Part {
    ChunkView view;  // without a page table
    DenseReason reason = DenseReason::kNone;
  };

  /// What all layers of a chunk share.
  struct Chunk {
    std::int32_t rows = 0;    // C, of all requests
    std::vector<Part> parts;  // [requests]; without tokens: the request rests
    bool dense = false;       // every part with tokens is
    CudaStepInput step;
    CudaStepSizes sizes;
  };

  /// The page lists of a layer, in units_ and page_ids_.
  struct Lists {
    std::int32_t max_units = 0;
    std::int32_t heads_per_unit = 1;
    const std::int32_t* num_units = nullptr;  // on the device, or null: max_units
  };

  CudaSequence(const CudaTransformer& model, std::int32_t num_requests, const SequenceOptions& options, Stream stream)
      : model_(&model),
        config_(&model.config()),
        options_(options),
        num_requests_(num_requests),
        num_pages_(num_requests * options.num_pages),
        max_rows_(num_requests * options.max_chunk_tokens),
        stream_(std::move(stream)),
        lengths_(static_cast<std::size_t>(num_requests), 0) {}

  [[nodiscard]] Status allocate();
  [[nodiscard]] Status prepare_selection(std::int32_t context);
  [[nodiscard]] Status grow(DeviceBuffer& buffer, std::int64_t bytes, std::string_view what);
  [[nodiscard]] CudaStepInput step_input(std::int32_t rows, std::int32_t context_tokens, bool dense) const;
  [[nodiscard]] PagedKvView layer_view(std::int32_t layer) const noexcept;
  [[nodiscard]] std::int64_t kept_bytes() const noexcept {  // of summaries on the device
    return mean_k_.bytes() + sub_mean_k_.bytes() + norm_k_.bytes() + gate_pool_.bytes() + gate_sum_.bytes();
  }
  [[nodiscard]] CudaPageSummaries layer_summaries(std::int32_t layer) const noexcept;
  [[nodiscard]] CudaSelectInput select_input(std::int32_t rows, std::int32_t layer) const noexcept;
  [[nodiscard]] CudaAttentionInput attention_input(std::int32_t rows, std::int32_t layer,
                                                   const Lists& lists) const noexcept;
  [[nodiscard]] Lists device_lists(const CudaStepSizes& sizes) const noexcept {
    return {sizes.max_units, sizes.heads_per_unit, num_units_.as<std::int32_t>()};
  }

  [[nodiscard]] Result<Chunk> begin_chunk(std::span<const std::span<const std::int32_t>> tokens, bool dense);
  [[nodiscard]] Result<Part> check_part(std::size_t request, std::span<const std::int32_t> tokens, bool dense) const;
  [[nodiscard]] Status run_layer(const Chunk& chunk, std::int32_t layer, ThreadPool& pool);
  [[nodiscard]] Status append(const Chunk& chunk, std::int32_t layer);
  [[nodiscard]] Status attend(const Chunk& chunk, std::int32_t layer, ThreadPool& pool);
  [[nodiscard]] Result<Lists> choose_pages(const Chunk& chunk, std::int32_t layer, ThreadPool& pool);
  [[nodiscard]] Status keep_all_pages_of_dense_parts(const Chunk& chunk);
  [[nodiscard]] Status unite(const Chunk& chunk, const DeviceBuffer& mask, UnionStats* stats);
  [[nodiscard]] Result<Lists> choose_on_host(const Chunk& chunk, std::int32_t layer, ThreadPool& pool);
  [[nodiscard]] Status read_logits(const Chunk& chunk, LogitsOf logits_of, std::vector<float>& logits);
  [[nodiscard]] Status trace(std::int32_t layer, const Lists& lists);
  [[nodiscard]] Status check_device_errors();
  [[nodiscard]] Status product(const Bf16Bits* w, const DeviceBuffer& x, const DeviceBuffer& y, std::int32_t out,
                               std::int32_t in, std::int32_t rows, Gemm::Output output);

  const CudaTransformer* model_;
  const ModelConfig* config_;
  SequenceOptions options_;
  std::int32_t num_requests_;  // B
  std::int32_t num_pages_;     // of all requests
  std::int32_t max_rows_;      // the same
  Stream stream_;
  std::vector<std::int32_t> lengths_;  // [B] tokens in the cache
  LayerLog log_;
  CudaMaskShape mask_shape_;                 // of the selector, if the GPU selects
  std::unique_ptr<Selector> host_selector_;  // null: the GPU selects
  HostMirror mirror_;
  bool mirrors_ = false;  // a host selector or an observer needs it
  AttentionObserver observer_;
  BlockMask host_mask_;  // reused from layer to layer
  PageLists host_lists_;

  // The cache: logical page j of request b is physical page b * options_.num_pages + j.
  DeviceBuffer kv_;           // bf16 [layers, 2, num_pages, Hkv, P, D]
  DeviceBuffer mean_k_;       // bf16 [layers, num_pages, Hkv, D]; like the next four empty unless the selector reads it
  DeviceBuffer sub_mean_k_;   // bf16 [layers, num_pages, Hkv, P/w, D]
  DeviceBuffer norm_k_;       // [layers, num_pages, Hkv, P]
  DeviceBuffer gate_pool_;    // [layers, num_pages, Hkv, P/64, 3, D]
  DeviceBuffer gate_sum_;     // [layers, num_pages, Hkv, P/64, D]
  DeviceBuffer mean_tokens_;  // [num_pages]
  DeviceBuffer page_table_;   // [B, options_.num_pages]

  // A chunk. Rows are tokens, max_rows_ at most.
  DeviceBuffer input_;     // CudaChunk [B], then token ids [C]
  DeviceBuffer rope_;      // [C, D/2, 2]
  DeviceBuffer residual_;  // bf16 [C, hidden]
  DeviceBuffer normed_;    // bf16 [C, hidden]
  DeviceBuffer qkv_;       // bf16 [C, Hq + 2 Hkv, D]
  DeviceBuffer attended_;  // bf16 [C, Hq, D]
  DeviceBuffer q_pre_;     // bf16 [C, Hq, D]  before RoPE, of seer alone
  DeviceBuffer gate_up_;   // bf16 [C, 2 intermediate]
  DeviceBuffer mlp_;       // bf16 [C, intermediate]
  CudaExperts experts_;    // of layers that have them
  DeviceBuffer logits_;    // fp32 [B or C, vocab]

  // The step.
  DeviceBuffer errors_;      // CudaStepError, CudaAttentionError
  DeviceBuffer gates_;       // of seer: keys, queries of all layers, then frequencies
  DeviceBuffer thresholds_;  // [layers, mask heads] or empty
  DeviceBuffer mask_;        // [mask heads, blocks, words]
  DeviceBuffer all_pages_;   // [Hkv, blocks, words], all bits set: dense
  DeviceBuffer units_;
  DeviceBuffer num_units_;
  DeviceBuffer page_ids_;
  DeviceBuffer dense_stats_;  // sums of lists that the host knows already
  DeviceBuffer step_workspace_;
  DeviceBuffer select_workspace_;
  DeviceBuffer attention_workspace_;
  DeviceBuffer gemm_workspace_;
};

}  // namespace compact::engine
