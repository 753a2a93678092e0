/// Requests on the CPU: the transformer's forward pass over a PagedKvCache.
#pragma once

#include <cstdint>
#include <memory>

#include "compact/paged_kv.h"
#include "engine/model/chunk_attention.h"
#include "engine/model/model.h"
#include "engine/model/transformer.h"

namespace compact::engine {

class CpuBatch final : public Batch {
 public:
  [[nodiscard]] static Result<std::unique_ptr<Batch>> create(const Transformer& model, const BatchOptions& options);

  [[nodiscard]] const PageTables& tables() const noexcept override { return cache_.tables(); }
  [[nodiscard]] Result<RequestId> add_request(std::span<const std::int32_t> prefix_pages) override;
  [[nodiscard]] Status release(RequestId request) override { return cache_.release(request); }
  [[nodiscard]] Status hold_page(std::int32_t page) override { return cache_.hold_page(page); }
  [[nodiscard]] Status drop_page(std::int32_t page) override { return cache_.drop_page(page); }
  [[nodiscard]] Status forward(std::span<const BatchPart> parts, ThreadPool& pool, std::vector<float>& logits) override;
  [[nodiscard]] Result<std::vector<LayerReport>> take_reports() override { return attention_.take_reports(); }
  [[nodiscard]] Status observe(AttentionObserver observer) override {
    attention_.observe(std::move(observer));
    return {};
  }
  [[nodiscard]] std::int64_t kv_bytes() const noexcept override { return cache_.kv_bytes(); }
  [[nodiscard]] std::int64_t summary_bytes() const noexcept override { return cache_.summary_bytes(); }

 private:
  CpuBatch(const Transformer& model, const BatchOptions& options, PagedKvCache cache, ChunkAttention attention)
      : model_(&model), options_(options), cache_(std::move(cache)), attention_(std::move(attention)) {}

  const Transformer* model_;
  BatchOptions options_;
  PagedKvCache cache_;
  ChunkAttention attention_;
};

}  // namespace compact::engine
