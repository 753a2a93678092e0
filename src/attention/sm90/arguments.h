// What the host hands to the sm_90a prefill kernel, and the entry of each head dimension.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "compact/status.h"
#include "compact/tensor_view.h"
#include "src/attention/sm90/launch.h"
#include "src/attention/sm90/sm90_config.h"
#include "src/attention/work_item.h"

namespace compact {

struct Sm90Arguments {
  CUtensorMap q_map;  // (D, Hq, T), box {64, heads_per_tile, BM / heads_per_tile}: row in tile = token, then head
  CUtensorMap k_map;  // (D, P, Hkv, num_pages), box {64, box_rows, 1, 1}
  CUtensorMap v_map;
  std::uint16_t* o;  // [T, Hq, D]
  std::int64_t o_token_stride;
  std::int64_t o_head_stride;
  float* lse;  // [T, Hq] or null
  const std::int32_t* page_ids;
  const WorkItem* work;
  const std::int32_t* num_items;
  std::int32_t* work_counter;
  float* partial_o;    // [slots, BM, D]
  float* partial_m_l;  // [slots, BM, 2]
  std::int32_t num_pages;
  std::int32_t num_q_heads;
  std::int32_t page_tokens_log2;
  std::int32_t box_rows;
  std::int32_t heads_per_tile_log2;
  float scale_log2;  // softmax scale * log2(e)
};

/// Checks the parameters and encodes the tensor maps for a tile.
[[nodiscard]] Result<Sm90Arguments> sm90_make_arguments(const Sm90Params& params, const Sm90Tile& tile);

// Launch on `num_sms` CTAs; dtype is kBF16 or kF16.
[[nodiscard]] cudaError_t sm90_run_d64(DType dtype, const Sm90Arguments& arguments, int num_sms, cudaStream_t stream);
[[nodiscard]] cudaError_t sm90_run_d128(DType dtype, const Sm90Arguments& arguments, int num_sms, cudaStream_t stream);
[[nodiscard]] cudaError_t sm90_run_d256(DType dtype, const Sm90Arguments& arguments, int num_sms, cudaStream_t stream);

}  // namespace compact
