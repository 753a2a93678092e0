/// A request on the CPU: the transformer's forward pass over a PagedKvCache of its own.
#pragma once

#include <memory>

#include "compact/paged_kv.h"
#include "engine/model/chunk_attention.h"
#include "engine/model/model.h"
#include "engine/model/transformer.h"

namespace compact::engine {

class CpuSequence final : public Sequence {
 public:
  [[nodiscard]] static Result<std::unique_ptr<Sequence>> create(const Transformer& model,
                                                                const SequenceOptions& options);

  [[nodiscard]] Status forward(std::span<const std::int32_t> tokens, bool dense, LogitsOf logits_of, ThreadPool& pool,
                               std::vector<float>& logits) override {
    return model_->forward(tokens, request_, dense, logits_of, cache_, attention_, pool, logits);
  }
  [[nodiscard]] Result<std::vector<LayerReport>> take_reports() override { return attention_.take_reports(); }
  [[nodiscard]] Status observe(AttentionObserver observer) override {
    attention_.observe(std::move(observer));
    return {};
  }
  [[nodiscard]] std::int64_t kv_bytes() const noexcept override { return cache_.kv_bytes(); }
  [[nodiscard]] std::int64_t summary_bytes() const noexcept override { return cache_.summary_bytes(); }

 private:
  CpuSequence(const Transformer& model, PagedKvCache cache, ChunkAttention attention)
      : model_(&model), cache_(std::move(cache)), attention_(std::move(attention)), request_(cache_.add_request()) {}

  const Transformer* model_;
  PagedKvCache cache_;
  ChunkAttention attention_;
  RequestId request_ = 0;
};

}  // namespace compact::engine
