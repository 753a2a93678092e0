// Host entry of the sm_90a prefill kernel over page lists. Lowest level: the public API checks the caller's input,
// runs the prepare kernel before this and the combine kernel after it.
#pragma once

#include <cstdint>

#include "compact/status.h"
#include "compact/tensor_view.h"
#include "src/attention/sm90/sm90_config.h"
#include "src/attention/work_item.h"

namespace compact {

// All pointers are device pointers. Strides in elements. bf16 or fp16 in, the same type out.
//
// What the prepare kernel must have written, on the same stream, before the kernel reads it:
//   work[0, *num_items)   items with tile indices in units of sm90_tile(head_dim).tokens and at most
//                         sm90_tile(head_dim).rows / heads_per_tile tokens each; best longest first. q_rows_valid >= 1.
//                         An item with tile_begin == tile_end has partial_slot == -1 and writes zeros and -inf.
//   *num_items            may be 0
//   *work_counter         num_sms: CTA b starts with item b, further items are drawn from the counter
// The kernel begins with griddepcontrol.wait and may be launched while its predecessor still runs.
struct Sm90Params {
  DType dtype = DType::kBF16;  // kBF16 or kF16
  std::int32_t head_dim = 0;   // D: 64, 128, 256

  const void* q = nullptr;          // [T, Hq, D]
  std::int64_t q_token_stride = 0;  // multiples of 8
  std::int64_t q_head_stride = 0;
  void* o = nullptr;  // [T, Hq, D]
  std::int64_t o_token_stride = 0;
  std::int64_t o_head_stride = 0;
  float* lse = nullptr;  // [T, Hq] or null; natural log, -inf for a row that sees nothing

  const void* k = nullptr;          // [num_pages, Hkv, P, D] in any order with D contiguous
  const void* v = nullptr;          // same strides as K
  std::int64_t kv_page_stride = 0;  // multiples of 8
  std::int64_t kv_head_stride = 0;
  std::int64_t kv_token_stride = 0;
  std::int32_t num_pages = 0;     // pages in the cache, >= 1
  std::int32_t num_kv_heads = 0;  // Hkv
  std::int32_t page_tokens = 0;   // P: a power of two, 16 or more

  std::int32_t num_q_tokens = 0;    // T >= 1
  std::int32_t num_q_heads = 0;     // Hq
  std::int32_t heads_per_tile = 0;  // a power of two up to kSm90MaxHeadsPerTile
  float softmax_scale = 0;          // above 0

  const std::int32_t* page_ids = nullptr;  // ids outside [0, num_pages) read as pages of zeros
  const WorkItem* work = nullptr;
  const std::int32_t* num_items = nullptr;  // [1]
  std::int32_t* work_counter = nullptr;     // [1]
  float* partial_o = nullptr;               // [slots, BM, D] unnormalised
  float* partial_m_l = nullptr;             // [slots, BM, 2]: row maximum times scale * log2(e), row sum
  int num_sms = 0;                          // grid size
  void* stream = nullptr;                   // cudaStream_t
};

/// Asynchronous on `stream`. Errors: kInvalidArgument, kUnsupported (head dimension, dtype, no TMA driver entry point),
/// kInternal with the text of the CUDA error.
[[nodiscard]] Status sm90_launch_prefill(const Sm90Params& params);

}  // namespace compact
