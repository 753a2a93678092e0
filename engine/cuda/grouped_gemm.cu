// Grouped products on mma.sync and cp.async, for sm_80 and later.
//
// A CTA owns a tile of up to 128 rows of one group and 128 rows of its weights, and walks the depth in steps of 64
// through a ring of stages:
//
//   shared memory, per stage   x [128][64]   w [128][64]   16-byte piece j of row r at j ^ (r & 7)
//   per step                   stage landed, barrier: all warps are done with the stage before
//                              load of the stage before with what comes next;  sums += x w^T
//
// 4 warps: 2 by rows, 2 by weights; a warp owns 64 weight rows and every other block of 16 rows. Two CTAs share an SM:
// one's barriers, first stages and stores run under the other's MMAs. Groups are small (64
// rows an expert at 1024 tokens of Qwen3-30B-A3B, where the weights' traffic bounds it), so a warp skips blocks without
// rows: time follows the rows in steps of 16, not of 128. Tiles of one group and all weights are neighbours in the
// grid: the second tile finds the weights in L2.
//
// `gated`: of a warp's 64 weight rows 32 are gates and 32 the values of the same columns, so both sums of an output are
// in one thread.
#include <algorithm>

#include "engine/cuda/grouped_gemm.h"
#include "src/ptx/convert.cuh"
#include "src/ptx/cp_async.cuh"
#include "src/ptx/ldmatrix.cuh"
#include "src/ptx/mma_sync.cuh"
#include "src/ptx/shared_address.cuh"

namespace compact::engine {
namespace {

constexpr std::int32_t kDepth = 64;  // of a stage
constexpr std::int32_t kPieces = kDepth / 8;
constexpr std::int32_t kWeights = 128;  // weight rows of a CTA
constexpr std::int32_t kThreads = 128;
constexpr std::int32_t kRowsPerPass = kThreads / kPieces;
constexpr std::int32_t kWarpWeights = 64;
constexpr std::int32_t kWarpBlocks = 4;  // blocks of 16 rows of a warp: 2 b + its row among the warps
constexpr std::int32_t kXBytes = kGroupTileRows * kDepth * 2;
constexpr std::int32_t kStageBytes = kXBytes + kWeights * kDepth * 2;

// Waits until the oldest of the stages in flight landed: of num_stages, all but the one in use are.
__device__ __forceinline__ void wait_for_stage(std::int32_t num_stages) {
  if (num_stages == 3) {
    ptx::cp_async_wait<1>();
  } else {
    ptx::cp_async_wait<0>();
  }
}

// sums += x w^T of one stage for the first kBlocks blocks of the warp.
template <std::int32_t kBlocks>
__device__ __forceinline__ void multiply_stage(std::uint32_t lane_x, std::uint32_t lane_w,
                                               float (&sums)[kWarpBlocks][kWarpWeights / 2]) {
#pragma unroll
  for (std::int32_t step = 0; step < kDepth / 16; ++step) {
    std::uint32_t x[kBlocks][4];
#pragma unroll
    for (std::int32_t b = 0; b < kBlocks; ++b) {
      ptx::ldmatrix_x4(
          x[b], (lane_x ^ static_cast<std::uint32_t>(step * 32)) + static_cast<std::uint32_t>(b * 32 * kDepth * 2));
    }
#pragma unroll
    for (std::int32_t j = 0; j < kWarpWeights / 8; j += 2) {
      std::uint32_t w[4];  // weight rows 8j..8j+7 and the eight after them
      ptx::ldmatrix_x4(
          w, (lane_w ^ static_cast<std::uint32_t>(step * 32)) + static_cast<std::uint32_t>(j * 8 * kDepth * 2));
#pragma unroll
      for (std::int32_t b = 0; b < kBlocks; ++b) {
        ptx::mma_m16n8k16<ptx::MmaType::kBf16>(&sums[b][4 * j], x[b], w[0], w[1]);
        ptx::mma_m16n8k16<ptx::MmaType::kBf16>(&sums[b][4 * j + 4], x[b], w[2], w[3]);
      }
    }
  }
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

template <bool kGated>
__global__ void __launch_bounds__(kThreads, 2)
    grouped_product_kernel(const GroupedProduct p, std::int32_t column_tiles, std::int32_t num_stages) {
  constexpr std::int32_t kColumns = kGated ? kWeights / 2 : kWeights;  // outputs of a CTA
  constexpr std::int32_t kWarpColumns = kGated ? kWarpWeights / 2 : kWarpWeights;
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const auto block = static_cast<std::int32_t>(blockIdx.x);
  const GroupTile tile = p.tiles[block / column_tiles];
  if (tile.rows == 0) return;
  const std::int32_t first_column = block % column_tiles * kColumns;

  // What this thread copies of every stage: piece `piece` of rows first_row + 32 i.
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  const std::int32_t piece = thread % kPieces;
  const std::int32_t first_row = thread / kPieces;
  constexpr std::int32_t kXPasses = kGroupTileRows / kRowsPerPass;
  constexpr std::int32_t kWPasses = kWeights / kRowsPerPass;
  const Bf16Bits* x[kXPasses];  // null: no such row
#pragma unroll
  for (std::int32_t i = 0; i < kXPasses; ++i) {
    const std::int32_t row = first_row + i * kRowsPerPass;
    x[i] = nullptr;
    if (row >= tile.rows) continue;
    const std::int32_t sorted = tile.first_row + row;
    x[i] = p.x + std::int64_t{p.x_rows == nullptr ? sorted : p.x_rows[sorted]} * p.in + piece * 8;
  }
  const Bf16Bits* const w =
      p.w + (std::int64_t{tile.group} * (kGated ? 2 : 1) * p.out + first_column + first_row) * p.in + piece * 8;
  const std::uint32_t shared = ptx::shared_address(shared_memory);
  const std::uint32_t to = ptx::swizzled_piece_offset<kDepth>(first_row, piece);
  const auto load = [&](std::int32_t stage, std::int32_t depth) {
    const bool inside = depth + piece * 8 < p.in;
    const std::uint32_t at = shared + static_cast<std::uint32_t>(stage * kStageBytes) + to;
#pragma unroll
    for (std::int32_t i = 0; i < kXPasses; ++i) {
      const bool valid = inside && x[i] != nullptr;
      ptx::cp_async_16(at + static_cast<std::uint32_t>(i * kRowsPerPass * kDepth * 2), valid ? x[i] + depth : p.x,
                       valid);
    }
#pragma unroll
    for (std::int32_t i = 0; i < kWPasses; ++i) {
      // Gated: rows 64 n..64 n + 31 of a stage are gates, the 32 after them values of the same columns.
      const std::int32_t in_stage = i * kRowsPerPass;
      const std::int32_t column = kGated ? in_stage / 64 * 32 + in_stage % 32 : in_stage;
      const std::int32_t row = kGated && in_stage % 64 >= 32 ? p.out + column : column;
      const bool valid = inside && first_column + first_row + column < p.out;
      ptx::cp_async_16(at + static_cast<std::uint32_t>(kXBytes + i * kRowsPerPass * kDepth * 2),
                       valid ? w + std::int64_t{row} * p.in + depth : p.w, valid);
    }
  };

  const std::int32_t lane = thread % 32;
  const std::int32_t warp_row = thread / 64;  // its blocks: 2 b + warp_row
  const std::int32_t warp_column = thread / 32 % 2;
  const std::int32_t blocks = max(0, ((tile.rows + 15) / 16 - warp_row + 1) / 2);
  const std::uint32_t lane_x = ptx::swizzled_piece_offset<kDepth>(warp_row * 16 + lane % 16, lane / 16);
  const std::uint32_t lane_w =
      kXBytes + ptx::swizzled_piece_offset<kDepth>(warp_column * kWarpWeights + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  float sums[kWarpBlocks][kWarpWeights / 2] = {};  // [block][n8 * 4 + fragment]

  const std::int32_t steps = (p.in + kDepth - 1) / kDepth;
  for (std::int32_t stage = 0; stage < num_stages - 1; ++stage) {
    if (stage < steps) load(stage, stage * kDepth);
    ptx::cp_async_commit();
  }
  std::int32_t stage = 0;
  std::int32_t free_stage = num_stages - 1;
  for (std::int32_t step = 0; step < steps; ++step) {
    wait_for_stage(num_stages);
    __syncthreads();
    if (step + num_stages - 1 < steps) load(free_stage, (step + num_stages - 1) * kDepth);
    ptx::cp_async_commit();
    // Addresses xor before they add: a stage begins at a multiple of 128 bytes, rows are as long.
    const std::uint32_t at = shared + static_cast<std::uint32_t>(stage * kStageBytes);
    switch (blocks) {
      case 4: multiply_stage<4>(at + lane_x, at + lane_w, sums); break;
      case 3: multiply_stage<3>(at + lane_x, at + lane_w, sums); break;
      case 2: multiply_stage<2>(at + lane_x, at + lane_w, sums); break;
      case 1: multiply_stage<1>(at + lane_x, at + lane_w, sums); break;
      default: break;
    }
    free_stage = stage;
    stage = stage + 1 == num_stages ? 0 : stage + 1;
  }

  const std::int32_t lane_column = first_column + warp_column * kWarpColumns + lane % 4 * 2;
#pragma unroll
  for (std::int32_t b = 0; b < kWarpBlocks; ++b) {
#pragma unroll
    for (std::int32_t half = 0; half < 2; ++half) {
      const std::int32_t row = (2 * b + warp_row) * 16 + half * 8 + lane / 4;
      if (row >= tile.rows) continue;
      Bf16Bits* const y = p.y + std::int64_t{tile.first_row + row} * p.out;
#pragma unroll
      for (std::int32_t j = 0; j < kWarpColumns / 8; ++j) {
        const std::int32_t column = lane_column + j * 8;
        if (column >= p.out) continue;
        float low = sums[b][4 * j + 2 * half];
        float high = sums[b][4 * j + 2 * half + 1];
        if constexpr (kGated) {
          low = silu(low) * sums[b][kWarpWeights / 4 + 4 * j + 2 * half];
          high = silu(high) * sums[b][kWarpWeights / 4 + 4 * j + 2 * half + 1];
        }
        *reinterpret_cast<std::uint32_t*>(y + column) = ptx::pack_pair<ptx::MmaType::kBf16>(low, high);
      }
    }
  }
}

template <bool kGated>
cudaError_t launch(const GroupedProduct& product, std::int32_t num_stages, cudaStream_t stream) {
  const std::int32_t shared_bytes = num_stages * kStageBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(grouped_product_kernel<kGated>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  const std::int32_t columns = kGated ? kWeights / 2 : kWeights;
  const std::int32_t column_tiles = (product.out + columns - 1) / columns;
  grouped_product_kernel<kGated><<<static_cast<unsigned>(product.num_tiles * column_tiles), kThreads,
                                   static_cast<std::size_t>(shared_bytes), stream>>>(product, column_tiles, num_stages);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_grouped_product(const GroupedProduct& product, cudaStream_t stream) {
  int device = 0, shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  // As deep as two CTAs have room for: 3 on an H200, else 2.
  const std::int32_t num_stages = std::clamp(shared_bytes / 2 / kStageBytes, 2, 3);
  return product.gated ? launch<true>(product, num_stages, stream) : launch<false>(product, num_stages, stream);
}

}  // namespace compact::engine
