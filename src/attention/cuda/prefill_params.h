// What a main kernel over page lists is told. No CUDA types. All pointers are device pointers, strides in elements.
#pragma once

#include <cstdint>

#include "compact/tensor_view.h"
#include "src/attention/work_item.h"

namespace compact {

// Where results go: the main kernels write final rows or partial slots, combine turns slots into final rows.
struct PrefillOutput {
  std::uint16_t* o = nullptr;       // [T, Hq, D] bf16 or fp16
  std::int64_t o_token_stride = 0;  // multiples of 8
  std::int64_t o_head_stride = 0;
  float* lse = nullptr;          // [T, Hq] or null; natural log, -inf for a row that sees nothing
  float* partial_o = nullptr;    // [slots, BM, D] unnormalised
  float* partial_m_l = nullptr;  // [slots, BM, 2]: row maximum times scale_log2 (-inf: saw nothing), row sum
  std::int32_t num_q_heads = 0;  // Hq
  std::int32_t heads_per_tile_log2 = 0;
};

// bf16 or fp16 in, the same type out. The prepare kernel has written on the same stream:
//   work[0, *num_items)   items, longest first; one with tile_begin == tile_end writes zeros and -inf
//   *work_counter         num_workers: CTA b starts with item b, further items are drawn from the counter
struct PrefillParams {
  PrefillOutput output;
  const void* q = nullptr;          // [T, Hq, D]
  std::int64_t q_token_stride = 0;  // multiples of 8
  std::int64_t q_head_stride = 0;
  const void* k = nullptr;  // pages of one layer; V has the same strides
  const void* v = nullptr;
  std::int64_t kv_page_stride = 0;  // multiples of 8
  std::int64_t kv_head_stride = 0;
  std::int64_t kv_token_stride = 0;
  const std::int32_t* page_ids = nullptr;  // ids outside [0, num_pages) read as pages of zeros
  const WorkItem* work = nullptr;
  const std::int32_t* num_items = nullptr;  // [1]
  std::int32_t* work_counter = nullptr;     // [1]

  DType dtype = DType::kBF16;         // kBF16 or kF16
  std::int32_t head_dim = 0;          // D: 64, 128, 256
  std::int32_t num_pages = 0;         // pages in the cache, >= 1
  std::int32_t num_kv_heads = 0;      // Hkv
  std::int32_t page_tokens_log2 = 0;  // P = 2^this, 16 or more
  std::int32_t num_q_tokens = 0;      // T >= 1
  std::int32_t num_workers = 0;       // grid size
  float scale_log2 = 0;               // softmax scale * log2(e), above 0
};

}  // namespace compact
