/// Keys of a page as fp32 rows for TileSoftmax: where they lie, or copied into a thread's scratch.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "compact/status.h"
#include "compact/tensor_view.h"

namespace compact {

class KeyRows {
 public:
  /// bf16 keys are converted. fp32 keys with gaps (NHD) are copied: at a stride of 4 KB the rows of a page fall into
  /// one set of the first-level cache, and a tile reads each of them several times.
  explicit KeyRows(const PagedKvView& kv);

  /// Rows [tokens] of consecutive tokens of a physical page. Valid until the next call.
  [[nodiscard]] std::span<const float* const> load(std::int32_t page, std::int32_t first_token, std::int32_t tokens,
                                                   std::int32_t kv_head);

 private:
  PagedKvView kv_;
  bool in_place_ = false;
  std::vector<float> staged_;       // [P, D]
  std::vector<const float*> rows_;  // [P]
};

/// Shapes of Q and the K cache, the scale, and that every page of every chunk lies in the cache. `who` begins the
/// message.
[[nodiscard]] Status check_key_input(const char* who, std::span<const ChunkView> chunks, const ConstRows& q,
                                     const PagedKvView& kv, float softmax_scale);

}  // namespace compact
