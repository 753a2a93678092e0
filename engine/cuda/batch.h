/// Requests on one GPU: their cache, activations, and the forward pass of their chunks, queued on a stream of its own.
///
/// A step is queued without waiting for the device: append -> [select -> lists] -> attend per layer, between products
/// and norms. Parts whose pages are chosen and parts that read every page have lists of their own: the former are
/// chosen and united in every layer, the latter once for all of them. The host waits where it reads: for logits, for
/// reports, while pages are traced for a picture, and in every layer if a selector has no CUDA twin or somebody
/// observes (host_mirror.h).
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <unordered_map>
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

class CudaBatch final : public Batch {
 public:
  [[nodiscard]] static Result<std::unique_ptr<Batch>> create(const CudaTransformer& model, const BatchOptions& options);

  [[nodiscard]] const PageTables& tables() const noexcept override { return tables_; }
  [[nodiscard]] Result<RequestId> add_request(std::span<const std::int32_t> prefix_pages) override;
  [[nodiscard]] Status release(RequestId request) override;
  [[nodiscard]] Status hold_page(std::int32_t page) override;
  [[nodiscard]] Status drop_page(std::int32_t page) override { return tables_.drop(page); }
  [[nodiscard]] Status forward(std::span<const BatchPart> parts, ThreadPool& pool, std::vector<float>& logits) override;
  [[nodiscard]] Result<std::vector<LayerReport>> take_reports() override;
  [[nodiscard]] Status observe(AttentionObserver observer) override;
  [[nodiscard]] std::int64_t kv_bytes() const noexcept override { return kv_.bytes(); }
  [[nodiscard]] std::int64_t summary_bytes() const noexcept override;

 private:
  /// A request on the device.
  struct Live {
    std::int32_t table_row = 0;       // of page_table_
    std::int32_t uploaded_pages = 0;  // entries of that row that are there
  };

  /// A request's part of a step.
  struct Part {
    RequestId request = 0;
    std::span<const std::int32_t> tokens;
    ChunkView view;  // without a page table
    DenseReason reason = DenseReason::kNone;
    LogitsOf logits = LogitsOf::kNone;
  };

  /// Where page lists are made: one of these for chosen pages, one for all pages.
  struct ListMemory {
    DeviceBuffer units;
    DeviceBuffer num_units;
    DeviceBuffer page_ids;
    DeviceBuffer stats;      // sums of lists that the host knows already; of all pages alone
    DeviceBuffer workspace;  // of the plan, read by all layers
  };

  /// The page lists of a layer.
  struct Lists {
    const ListMemory* memory = nullptr;
    std::int32_t max_units = 0;
    std::int32_t heads_per_unit = 1;
    const std::int32_t* num_units = nullptr;  // on the device, or null: max_units
  };

  /// Parts of a step with lists of one kind.
  struct Group {
    std::int32_t num_parts = 0;  // 0: no lists
    CudaStepInput step;
    CudaStepSizes sizes;
  };

  /// What all layers of a forward share.
  struct Step {
    std::int32_t rows = 0;    // C, of all requests
    std::vector<Part> parts;  // in the order of their rows
    CudaStepInput all;
    Group chosen;
    Group dense;
  };

  CudaBatch(const CudaTransformer& model, const BatchOptions& options, Stream stream, PageTables tables)
      : model_(&model),
        config_(&model.config()),
        options_(options),
        stream_(std::move(stream)),
        tables_(std::move(tables)) {}

  [[nodiscard]] Status allocate();
  [[nodiscard]] Status prepare_selection(const CudaStepInput& longest);
  [[nodiscard]] Status grow(DeviceBuffer& buffer, std::int64_t bytes, std::string_view what);
  [[nodiscard]] CudaStepInput step_input(std::int32_t first_chunk, std::int32_t num_chunks, std::int32_t rows,
                                         std::int32_t context_tokens, bool dense) const;
  [[nodiscard]] PagedKvView layer_view(std::int32_t layer) const noexcept;
  [[nodiscard]] std::int64_t kept_bytes() const noexcept {  // of summaries on the device
    return mean_k_.bytes() + sub_mean_k_.bytes() + norm_k_.bytes() + gate_pool_.bytes() + gate_sum_.bytes();
  }
  [[nodiscard]] CudaPageSummaries layer_summaries(std::int32_t layer) const noexcept;
  [[nodiscard]] CudaSelectInput select_input(std::int32_t rows, std::int32_t layer) const noexcept;
  [[nodiscard]] CudaAttentionInput attention_input(std::int32_t rows, std::int32_t layer,
                                                   const Lists& lists) const noexcept;
  [[nodiscard]] static Lists device_lists(const ListMemory& memory, const CudaStepSizes& sizes) noexcept {
    return {&memory, sizes.max_units, sizes.heads_per_unit, memory.num_units.as<std::int32_t>()};
  }
  [[nodiscard]] std::int32_t* token_ids() const noexcept {  // [C], behind the chunks
    return reinterpret_cast<std::int32_t*>(input_.as<CudaChunk>() + options_.max_requests);
  }

  [[nodiscard]] Result<Step> begin_step(std::span<const BatchPart> parts);
  [[nodiscard]] Result<Part> plan_part(const BatchPart& part) const;
  [[nodiscard]] Status group_parts(Step& step) const;
  [[nodiscard]] Status upload_input(const Step& step);
  [[nodiscard]] Status upload_page_table(RequestId request);
  [[nodiscard]] Status run_layer(const Step& step, std::int32_t layer, ThreadPool& pool);
  [[nodiscard]] Status append(const Step& step, std::int32_t layer);
  [[nodiscard]] Status attend(const Step& step, std::int32_t layer, ThreadPool& pool);
  [[nodiscard]] Status attend_lists(const Step& step, std::int32_t layer, const Lists& lists);
  [[nodiscard]] Result<Lists> choose_pages(const Step& step, std::int32_t layer, ThreadPool& pool);
  [[nodiscard]] Result<Lists> choose_on_host(std::int32_t layer, const Step& step, ThreadPool& pool);
  [[nodiscard]] Result<Lists> take_all_pages(const Step& step, std::int32_t layer);
  [[nodiscard]] Status read_logits(const Step& step, std::vector<float>& logits);
  [[nodiscard]] Status trace(std::int32_t layer, const Lists& lists);
  [[nodiscard]] Status check_device_errors();
  [[nodiscard]] Status product(const Bf16Bits* w, const DeviceBuffer& x, const DeviceBuffer& y, std::int32_t out,
                               std::int32_t in, std::int32_t rows, Gemm::Output output);

  const CudaTransformer* model_;
  const ModelConfig* config_;
  BatchOptions options_;
  Stream stream_;
  PageTables tables_;
  std::unordered_map<RequestId, Live> live_;
  std::vector<std::int32_t> free_rows_;  // of page_table_
  LayerLog log_;
  CudaMaskShape mask_shape_;                 // of the selector, if the GPU selects
  std::unique_ptr<Selector> host_selector_;  // null: the GPU selects
  HostMirror mirror_;
  bool mirrors_ = false;  // a host selector or an observer needs it
  AttentionObserver observer_;
  BlockMask host_mask_;  // reused from layer to layer
  PageLists host_lists_;

  // The cache, by physical page.
  DeviceBuffer kv_;          // bf16 [layers, 2, num_pages, Hkv, P, D]
  DeviceBuffer mean_k_;      // bf16 [layers, num_pages, Hkv, D]; like the next four empty unless the selector reads it
  DeviceBuffer sub_mean_k_;  // bf16 [layers, num_pages, Hkv, P/w, D]
  DeviceBuffer norm_k_;      // [layers, num_pages, Hkv, P]
  DeviceBuffer gate_pool_;   // [layers, num_pages, Hkv, P/64, 3, D]
  DeviceBuffer gate_sum_;    // [layers, num_pages, Hkv, P/64, D]
  // [num_pages]. Nothing to reset when a page is given anew: its request appends to it before it is a past page of
  // anybody, and the append writes 0 or P.
  DeviceBuffer mean_tokens_;
  DeviceBuffer page_table_;  // [max_requests, pages of a request]  a row for each live request

  // A step. Rows are tokens, max_step_tokens at most.
  DeviceBuffer input_;     // CudaChunk [max_requests], those of chosen pages first, then token ids [C]
  DeviceBuffer rope_;      // [C, D/2, 2]
  DeviceBuffer residual_;  // bf16 [C, hidden]
  DeviceBuffer normed_;    // bf16 [C, hidden]
  DeviceBuffer qkv_;       // bf16 [C, Hq + 2 Hkv, D]
  DeviceBuffer attended_;  // bf16 [C, Hq, D]
  DeviceBuffer q_pre_;     // bf16 [C, Hq, D]  before RoPE, of seer alone
  DeviceBuffer gate_up_;   // bf16 [C, 2 intermediate]
  DeviceBuffer mlp_;       // bf16 [C, intermediate]
  CudaExperts experts_;    // of layers that have them
  DeviceBuffer logits_;    // fp32 [rows asked for, vocab]

  // Attention.
  DeviceBuffer errors_;      // CudaStepError, CudaAttentionError
  DeviceBuffer gates_;       // of seer: keys, queries of all layers, then frequencies
  DeviceBuffer thresholds_;  // [layers, mask heads] or empty
  DeviceBuffer mask_;        // [mask heads, blocks, words]
  ListMemory chosen_;
  ListMemory dense_;
  DeviceBuffer select_workspace_;
  DeviceBuffer attention_workspace_;
  DeviceBuffer gemm_workspace_;
};

}  // namespace compact::engine
