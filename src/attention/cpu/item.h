/// What one item of the CPU kernel owns, and the scratch it works in. Shared by all instruction sets.
#pragma once

#include <cstdint>

#include "compact/attention.h"

namespace compact::cpu {

// Ice Lake server, 1 thread, AVX-512, C 1024, L 8192, P 128, Hq 8, Hkv 2, fp32, in % of the sgemm rate of the same run
// (attention_cpu_bench --threads 1 --cpu-time; the machine was busy, differences below 5 points are noise):
//   keys in a block  64 / 128 / 256      D 64: 99 / 95 / 86     D 128: 105 / 103 / 101
//   tiles in an item  1 / 2 / 4 / 8      D 64: 68 / 79 / 93 / 99   D 128: 71 / 91 / 104 / 98   (K and V staged)

/// Keys between two updates of the running maximum. S^T of a block (24 KB) and Q^T (24 KB at D 128) share L1.
inline constexpr std::int32_t kKeyBlock = 128;

/// Row tiles that share a walk over the list, and each staged block of K and V.
inline constexpr std::int32_t kMaxTilesPerItem = 8;

/// Consecutive row tiles of one unit. Packed row r of a unit is (token r / heads_per_unit, head r % heads_per_unit).
struct Item {
  std::int32_t unit = 0;
  std::int64_t first_row = 0;  // packed
  std::int64_t num_rows = 0;   // at most tiles_per_item * tile_rows
  std::int64_t cost = 0;       // rows * keys seen by the last row
};

/// One thread's scratch, floats unless noted. M = tile_rows; the parts of a tile lie together. 64-byte aligned.
/// AVX-512 (M 48), D 128, 8 tiles: 390 KB of tiles + 24 KB of scores + 128 KB staged + 2 KB of pointers, in 1.25 MB of
/// L2.
struct Scratch {
  float* tiles = nullptr;          // [tiles_per_item, tile_floats(D, M)]
  float* scores = nullptr;         // [kKeyBlock, M]       S^T, then P^T of the tile at work
  float* staged_k = nullptr;       // [kKeyBlock, D]       null unless staging
  float* staged_v = nullptr;       // [kKeyBlock, D]
  const float** k_rows = nullptr;  // [kKeyBlock]          where each key of the block lies
  const float** v_rows = nullptr;  // [kKeyBlock]
  SkipCount skip_count;            // of the items that this thread has done
};

/// A tile's part: Q^T [D, M], O^T [D, M], running maximum [M], running sum [M], visible limit [M] (int32), rescale [M].
[[nodiscard]] constexpr std::int64_t tile_floats(std::int64_t head_dim, std::int64_t tile_rows) noexcept {
  return (2 * head_dim + 4) * tile_rows;
}

/// All items of a call see this.
struct Call {
  AttentionInput input;
  AttentionOutput output;
  std::int32_t tile_rows = 0;  // M
  std::int32_t tiles_per_item = 0;
  float log2_lambda = 0;       // of skip-softmax
  float log2_page_tokens = 0;  // what a mean of a dropped page counts for
  bool stage = false;          // scratch has room for a block of K and V in fp32
};

}  // namespace compact::cpu
