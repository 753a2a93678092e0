/// What one item of the CPU kernel owns, and the scratch it works in. Shared by all instruction sets.
#pragma once

#include <cstdint>

#include "compact/attention.h"

namespace compact::cpu {

// Keys between two updates of the running maximum. Ice Lake server, one core, D 128, 1024 queries on 8192 keys,
// benchmarks/attention_cpu_bench.cc: see the table in attention.cc.
inline constexpr std::int32_t kKeyBlock = 128;

// Row tiles that share a walk over the list.
inline constexpr std::int32_t kMaxTilesPerItem = 4;

/// Consecutive row tiles of one unit. Packed row r of a unit is (token r / heads_per_unit, head r % heads_per_unit).
struct Item {
  std::int32_t unit = 0;
  std::int64_t first_row = 0;   // packed
  std::int64_t num_rows = 0;    // at most tiles_per_item * tile_rows
  std::int64_t cost = 0;        // rows * keys seen by the last row
};

/// One thread's scratch, floats unless noted. M = tile_rows; the parts of a tile lie together. 64-byte aligned.
struct Scratch {
  float* tiles = nullptr;          // [tiles_per_item, tile_floats(D, M)]
  float* scores = nullptr;         // [kKeyBlock, M]       S^T, then P^T of the tile at work
  float* staged_k = nullptr;       // [kKeyBlock, D]       null unless staging
  float* staged_v = nullptr;       // [kKeyBlock, D]
  const float** k_rows = nullptr;  // [kKeyBlock]          where each key of the block lies
  const float** v_rows = nullptr;  // [kKeyBlock]
};

/// A tile's part: Q^T [D, M], O^T [D, M], running maximum [M], running sum [M], visible limit [M] (int32), rescale [M].
[[nodiscard]] constexpr std::int64_t tile_floats(std::int64_t head_dim, std::int64_t tile_rows) noexcept {
  return (2 * head_dim + 4) * tile_rows;
}

/// All items of a call see this.
struct Call {
  AttentionInput input;
  AttentionOutput output;
  std::int32_t tile_rows = 0;       // M
  std::int32_t tiles_per_item = 0;
  bool stage = false;               // copy or convert each block of K and V to fp32 scratch
};

}  // namespace compact::cpu
