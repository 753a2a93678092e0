// Shape constants of the portable kernel (sm_80 and later). No CUDA types: the schedule takes the tile from here.
#pragma once

#include <cstdint>

namespace compact {

// A tile: `rows` packed query rows against `tokens` KV tokens; each warp owns rows / warps rows. One stage of K and one
// of V: V loads under Q K^T and softmax, the next K under P V.
struct Sm80Tile {
  std::int32_t head_dim;
  std::int32_t rows;    // BM
  std::int32_t tokens;  // BN
  std::int32_t warps;

  constexpr std::int32_t threads() const { return 32 * warps; }
  constexpr std::int32_t row_blocks() const { return rows / warps / 16; }  // m16 blocks per warp
  constexpr std::int32_t smem_bytes() const { return (rows + 2 * tokens) * head_dim * 2; }
};

// 32 rows per warp: each K and V fragment read from shared memory serves two MMAs; with 16 rows the reads alone would
// take as long as the tensor cores. Head dimension 256 has no registers for that.
inline constexpr Sm80Tile kSm80TileD64{64, 128, 64, 4};    // 32 KB; 128 tokens spill
inline constexpr Sm80Tile kSm80TileD128{128, 128, 64, 4};  // 64 KB
inline constexpr Sm80Tile kSm80TileD256{256, 64, 64, 4};   // 96 KB: fits the 99 KB of sm_86 and sm_89

// rows == 0: there is no kernel for this head dimension.
constexpr Sm80Tile sm80_tile(std::int32_t head_dim) {
  return head_dim == 64 ? kSm80TileD64 : head_dim == 128 ? kSm80TileD128 : head_dim == 256 ? kSm80TileD256 : Sm80Tile{};
}

}  // namespace compact
