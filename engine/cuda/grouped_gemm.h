/// Products of many small groups of rows, each with a weight matrix of its own, in bf16 with fp32 sums: the experts of
/// a mixture. The sizes of the groups lie on the device: nothing is read back, the launch covers the most there can be.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/cuda/kernels.h"

namespace compact::engine {

/// Rows of one group that a CTA computes.
struct GroupTile {
  std::int32_t group = 0;
  std::int32_t first_row = 0;  // of the sorted rows
  std::int32_t rows = 0;       // 0: nothing to do
};

constexpr std::int32_t kGroupTileRows = 128;

/// Tiles that `num_rows` rows in `num_groups` groups can need. Group g's begin at place begin(g) / kGroupTileRows + g,
/// where begin(g) counts the rows before it: places that no two groups share, whatever their sizes.
constexpr std::int32_t max_group_tiles(std::int32_t num_rows, std::int32_t num_groups) {
  return num_rows / kGroupTileRows + num_groups;
}

struct GroupedProduct {
  const Bf16Bits* x = nullptr;           // [*, in]
  const std::int32_t* x_rows = nullptr;  // [num_rows] the row of x that a sorted row reads, or null: its own
  const Bf16Bits* w = nullptr;           // [groups, out, in]; with `gated` [groups, 2 out, in]: gates, then values
  Bf16Bits* y = nullptr;                 // [num_rows, out]
  const GroupTile* tiles = nullptr;      // [num_tiles]
  std::int32_t num_tiles = 0;
  std::int32_t in = 0;  // multiples of 8
  std::int32_t out = 0;
  bool gated = false;  // y = silu(gate) * value
};

/// y[r, :] = W[group of r] x[x_rows[r], :] for the rows of all tiles. Bits of a row do not depend on the other rows.
cudaError_t launch_grouped_product(const GroupedProduct& product, cudaStream_t stream);

}  // namespace compact::engine
