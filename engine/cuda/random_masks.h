/// Masks of the selector `random` for the device. They depend on no query, so the library's selector makes one row per
/// KV head on the host, and every query block gets a copy: the pages that the CPU backend reads.
#pragma once

#include <cstdint>
#include <memory>

#include "compact/selector.h"
#include "compact/step_cuda.h"
#include "engine/cuda/device.h"

namespace compact::engine {

class RandomMasks {
 public:
  RandomMasks() = default;
  /// mask_words: of one layer at most.
  [[nodiscard]] static Result<RandomMasks> create(const SelectorOptions& selector, const ForcedPages& forced,
                                                  std::int32_t num_layers, std::int64_t mask_words);

  /// The next chunk begins: its masks must not overwrite those still on their way.
  [[nodiscard]] Status begin_chunk();
  /// Queues the copy of a layer's mask for a chunk that starts at `chunk_start`. mask: [Hkv, max_blocks,
  /// words_per_row].
  [[nodiscard]] Status upload(std::int32_t layer, std::int32_t chunk_start, const CudaStepInput& step,
                              const CudaStepSizes& sizes, std::uint64_t* mask, ThreadPool& pool, cudaStream_t stream);

 private:
  std::unique_ptr<Selector> selector_;
  ForcedPages forced_;
  std::int32_t num_layers_ = 0;
  std::int64_t mask_words_ = 0;
  PinnedBuffer words_;  // [2, layers, mask_words]: chunks take turns
  Event sent_[2];       // the last copy of each turn
  std::int32_t turn_ = 0;
  BlockMask rows_;  // [Hkv, 1, words]
};

}  // namespace compact::engine
