/// What the CPU's selectors and measurements need of a request on the GPU: its cache once more, with the summaries
/// that they read, and the queries of a layer. Every layer is copied as it is computed, so the host waits for the
/// device.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "compact/paged_kv.h"
#include "engine/cuda/device.h"
#include "engine/model/model.h"

namespace compact::engine {

class HostMirror {
 public:
  HostMirror() = default;
  /// Errors: kUnsupported (records of keys before RoPE); those of PagedKvCache.
  [[nodiscard]] static Result<HostMirror> create(const ModelConfig& config, const BatchOptions& options,
                                                 SummaryFields needs);

  /// Another request begins: what the last one had is forgotten.
  void restart();

  /// Room for the next chunk. Errors: kUnsupported if earlier tokens were not copied.
  [[nodiscard]] Status begin_chunk(std::int32_t start, std::int32_t rows);

  /// Copies one layer of the chunk: queries and, from the pages of `kv`, keys and values. Logical page j is physical
  /// page j. q: [C, Hq, D] on the device, q_token_stride elements between tokens.
  [[nodiscard]] Status copy_layer(std::int32_t layer, const void* q, std::int64_t q_token_stride, const PagedKvView& kv,
                                  const Stream& stream, ThreadPool& pool);

  [[nodiscard]] const PagedKvCache& cache() const noexcept { return *cache_; }
  [[nodiscard]] const ChunkView& chunk() const noexcept { return chunk_; }
  [[nodiscard]] ConstRows q() const noexcept {
    return contiguous_rows<const float>(q_.data(), chunk_.chunk_tokens, num_q_heads_, head_dim_);
  }

 private:
  std::unique_ptr<PagedKvCache> cache_;
  RequestId request_ = 0;
  std::int32_t num_q_heads_ = 0;
  std::int32_t num_kv_heads_ = 0;
  std::int32_t head_dim_ = 0;
  ChunkView chunk_;
  PinnedBuffer copied_;       // bf16, of one layer and chunk: q, pages of K, pages of V
  std::vector<float> q_;      // [C, Hq, D]
  std::vector<float> k_, v_;  // [C, Hkv, D]
};

}  // namespace compact::engine
