// What the host hands to the sm_90a prefill kernel, and the entry of each head dimension.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "compact/status.h"
#include "src/attention/cuda/prefill_params.h"
#include "src/attention/sm90/sm90_config.h"

namespace compact {

struct Sm90Arguments {
  CUtensorMap q_map;  // (D, Hq, T), box {64, heads_per_tile, BM / heads_per_tile}: row in tile = token, then head
  CUtensorMap k_map;  // (D, P, Hkv, num_pages), box {64, box_rows, 1, 1}
  CUtensorMap v_map;
  PrefillParams params;
  std::int32_t box_rows;
};

// Encodes the tensor maps for a tile.
[[nodiscard]] Status sm90_make_arguments(const PrefillParams& params, const Sm90Tile& tile, Sm90Arguments& arguments);

// One file per head dimension, so that they compile side by side.
[[nodiscard]] cudaError_t sm90_run_d64(const Sm90Arguments& arguments, cudaStream_t stream);
[[nodiscard]] cudaError_t sm90_run_d128(const Sm90Arguments& arguments, cudaStream_t stream);
[[nodiscard]] cudaError_t sm90_run_d256(const Sm90Arguments& arguments, cudaStream_t stream);

}  // namespace compact
