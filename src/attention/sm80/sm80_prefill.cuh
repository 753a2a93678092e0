// The portable kernel over page lists: FlashAttention-2 structure on mma.sync and cp.async, for sm_80 and later.
//
// A CTA draws work items (work_item.h) until none is left. An item is an M-tile of BM packed query rows against KV
// tiles [tile_begin, tile_end), walked from last to first so that the masked tiles come first. Each warp owns
// BM / warps rows with their maximum, sum and output in registers.
//
//   shared memory   q [BM][D]   k [BN][D]   v [BN][D]   rows of D elements, 16-byte piece j of row r at j ^ (r & 7):
//                   cp.async writes and ldmatrix reads touch all banks once
//   per KV tile     K landed, barrier          all warps are done with V of the tile before
//                   load V;  S = Q K^T;  mask;  P = exp2(S - max)
//                   V landed, barrier          all warps are done with K
//                   load K of the next tile;  O += P V
//
// Two CTAs share an SM: one's softmax and barriers run under the other's MMAs. Pages are gathered 16 bytes at a time;
// a token past the list, or in a page outside the cache, becomes zeros, so that 0 * V is never 0 * NaN.
#pragma once

#include <cmath>
#include <cstdint>

#include "src/attention/cuda/prefill_params.h"
#include "src/attention/epilogue.cuh"
#include "src/attention/mask.cuh"
#include "src/attention/schedule.h"
#include "src/attention/sm80/sm80_config.h"
#include "src/attention/softmax.cuh"
#include "src/ptx/control.cuh"
#include "src/ptx/cp_async.cuh"
#include "src/ptx/ldmatrix.cuh"
#include "src/ptx/mma_sync.cuh"
#include "src/ptx/shared_address.cuh"

namespace compact {

// Starts the copy of KV tile `tile_idx` of a list: BN rows of one head of K or V.
template <std::int32_t kHeadDim>
__device__ __forceinline__ void sm80_load_kv(std::uint32_t shared, const void* cache, const PrefillParams& p,
                                             const WorkItem& item, std::int32_t tile_idx) {
  constexpr Sm80Tile kTile = sm80_tile(kHeadDim);
  constexpr std::int32_t kPieces = kHeadDim / 8;
  constexpr std::int32_t kRowsPerPass = kTile.threads() / kPieces;
  constexpr std::int32_t kPasses = kTile.tokens / kRowsPerPass;
  std::int32_t thread = static_cast<std::int32_t>(threadIdx.x);
  std::int32_t page_shift = p.page_tokens_log2;
  // Opaque: no induction variables are kept in registers from tile to tile.
  asm volatile("" : "+r"(tile_idx), "+r"(thread), "+r"(page_shift));
  const std::int32_t piece = thread % kPieces;
  const std::int32_t first_row = thread / kPieces;
  const std::int32_t first_token = tile_idx * kTile.tokens + first_row;
  const std::int32_t* list = p.page_ids + item.list_begin;
  const std::int32_t list_tokens = item.list_tokens;
  const std::uint16_t* head = static_cast<const std::uint16_t*>(cache) + item.kv_head * p.kv_head_stride + piece * 8;
  constexpr std::int32_t kGroup = 4;  // ids of a group first: one wait for the table instead of one per row
  static_assert(kPasses % kGroup == 0, "groups fill the passes evenly");
#pragma unroll
  for (std::int32_t group = 0; group < kPasses; group += kGroup) {
    std::int32_t page[kGroup];
#pragma unroll
    for (std::int32_t i = 0; i < kGroup; ++i) {
      const std::int32_t c = first_token + (group + i) * kRowsPerPass;
      page[i] = c < list_tokens ? list[c >> page_shift] : -1;
    }
#pragma unroll
    for (std::int32_t i = 0; i < kGroup; ++i) {
      const std::int32_t row = (group + i) * kRowsPerPass;
      const std::int32_t row_in_page = (first_token + row) & ((1 << page_shift) - 1);
      const bool valid = static_cast<std::uint32_t>(page[i]) < static_cast<std::uint32_t>(p.num_pages);
      const std::uint16_t* from = head + (valid ? page[i] * p.kv_page_stride + row_in_page * p.kv_token_stride : 0);
      ptx::cp_async_16(shared + ptx::swizzled_piece_offset<kHeadDim>(first_row + row, piece), from, valid);
    }
  }
}

// Starts the copy of the item's query rows; rows that do not exist become zeros.
template <std::int32_t kHeadDim>
__device__ __forceinline__ void sm80_load_q(std::uint32_t shared, const PrefillParams& p, const WorkItem& item) {
  constexpr Sm80Tile kTile = sm80_tile(kHeadDim);
  constexpr std::int32_t kPieces = kHeadDim / 8;
  constexpr std::int32_t kRowsPerPass = kTile.threads() / kPieces;
  const std::int32_t piece = static_cast<std::int32_t>(threadIdx.x) % kPieces;
  for (std::int32_t row = static_cast<std::int32_t>(threadIdx.x) / kPieces; row < kTile.rows; row += kRowsPerPass) {
    const std::int32_t heads_log2 = p.output.heads_per_tile_log2;
    const std::int32_t token = row >> heads_log2;
    const std::int32_t head = item.q_head + (row & ((1 << heads_log2) - 1));
    const bool valid = token < item.q_rows_valid;
    const auto* from = static_cast<const std::uint16_t*>(p.q) +
                       (valid ? (item.q_row + token) * p.q_token_stride + head * p.q_head_stride : 0);
    ptx::cp_async_16(shared + ptx::swizzled_piece_offset<kHeadDim>(row, piece), from + piece * 8, valid);
  }
}

template <ptx::MmaType kType, std::int32_t kHeadDim>
__global__ void __launch_bounds__(sm80_tile(kHeadDim).threads(), 2) sm80_prefill_kernel(const PrefillParams p) {
  constexpr Sm80Tile kTile = sm80_tile(kHeadDim);
  constexpr std::int32_t kRowBlocks = kTile.row_blocks();  // m16 blocks of this warp
  constexpr std::int32_t kKeyBlocks = kTile.tokens / 8;    // n8 blocks of S
  constexpr std::int32_t kOutBlocks = kHeadDim / 8;        // n8 blocks of O
  static_assert(kRowBlocks * 16 * kTile.warps == kTile.rows, "warps share the rows evenly");
  static_assert(kTile.tokens % (kTile.threads() / (kHeadDim / 8)) == 0, "passes of the gather fill the tile evenly");

  extern __shared__ __align__(128) unsigned char shared_memory[];
  __shared__ WorkItem item;  // not in registers: they are full
  __shared__ std::int32_t next_index;
  const std::uint32_t shared_q = ptx::shared_address(shared_memory);
  const std::uint32_t shared_k = shared_q + kTile.rows * kHeadDim * 2;
  const std::uint32_t shared_v = shared_k + kTile.tokens * kHeadDim * 2;

  std::int32_t lane = static_cast<std::int32_t>(threadIdx.x) % 32;
  std::int32_t warp_row = static_cast<std::int32_t>(threadIdx.x) / 32 * kRowBlocks * 16;

  // This lane's rows of the 8x8 matrices of a fragment, for the first step: of Q (from the warp's first row) and V, and
  // of K.
  std::uint32_t lane_qv = ptx::swizzled_piece_offset<kHeadDim>(lane % 16, lane / 16);
  std::uint32_t lane_k = ptx::swizzled_piece_offset<kHeadDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2);

  ptx::griddep_wait();
  const std::int32_t num_items = *p.num_items;
  for (std::int32_t index = static_cast<std::int32_t>(blockIdx.x); index < num_items; index = next_index) {
    if (threadIdx.x == 0) item = p.work[index];
    __syncthreads();
    const auto load_kv = [&](std::uint32_t shared, const void* cache, std::int32_t tile) {
      sm80_load_kv<kHeadDim>(shared, cache, p, item, tile);
      ptx::cp_async_commit();
    };

    float o[kRowBlocks][kHeadDim / 2] = {};  // fragments as in softmax.cuh
    float row_max[kRowBlocks][2];            // of the logits before scaling
    float row_sum[kRowBlocks][2] = {};
    for (auto& pair : row_max) pair[0] = pair[1] = -INFINITY;

    if (item.tile_begin < item.tile_end) {  // otherwise zeros and -inf
      sm80_load_q<kHeadDim>(shared_q, p, item);
      load_kv(shared_k, p.k, item.tile_end - 1);
    }
    // Everyone has read the index before; the atomic's latency hides behind the first tile's.
    if (threadIdx.x == 0) next_index = atomicAdd(p.work_counter, 1);
    for (std::int32_t tile = item.tile_end - 1; tile >= item.tile_begin; --tile) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      load_kv(shared_v, p.v, tile);
      // Opaque per tile: hoisted out of the loop, what is derived from them would spill.
      asm volatile("" : "+r"(lane_qv), "+r"(lane_k), "+r"(lane), "+r"(warp_row));

      float s[kRowBlocks][kTile.tokens / 2] = {};
#pragma unroll 4  // all steps at once spill at head dimension 128
      for (std::int32_t step = 0; step < kHeadDim / 16; ++step) {
        std::uint32_t a[kRowBlocks][4];
#pragma unroll
        for (std::int32_t b = 0; b < kRowBlocks; ++b) {
          ptx::ldmatrix_x4(a[b], shared_q + (lane_qv ^ static_cast<std::uint32_t>(step * 32)) +
                                     static_cast<std::uint32_t>((warp_row + b * 16) * kHeadDim * 2));
        }
#pragma unroll
        for (std::int32_t j = 0; j < kKeyBlocks; j += 2) {
          std::uint32_t keys[4];  // tokens 8j..8j+7 and the eight after them
          ptx::ldmatrix_x4(keys, shared_k + (lane_k ^ static_cast<std::uint32_t>(step * 32)) +
                                     static_cast<std::uint32_t>(j * 8 * kHeadDim * 2));
#pragma unroll
          for (std::int32_t b = 0; b < kRowBlocks; ++b) {
            ptx::mma_m16n8k16<kType>(&s[b][4 * j], a[b], keys[0], keys[1]);
            ptx::mma_m16n8k16<kType>(&s[b][4 * j + 4], a[b], keys[2], keys[3]);
          }
        }
      }

      if (tile >= item.first_masked_tile) {
#pragma unroll
        for (std::int32_t b = 0; b < kRowBlocks; ++b) {
          std::int32_t visible_columns[2];
#pragma unroll
          for (std::int32_t h = 0; h < 2; ++h) {
            const std::int32_t row = warp_row + 16 * b + lane / 4 + 8 * h;
            const std::int32_t sees = item.visible_base + (row >> p.output.heads_per_tile_log2) + 1;
            visible_columns[h] = min_i32(item.list_tokens, sees) - tile * kTile.tokens;
          }
          mask_columns(s[b], visible_columns, lane);
        }
      }

      std::uint32_t weights[kRowBlocks][kTile.tokens / 4];  // P as A fragments
#pragma unroll
      for (std::int32_t b = 0; b < kRowBlocks; ++b) {
        float rescale[2];
        online_softmax<true>(s[b], row_max[b], row_sum[b], rescale, p.scale_log2);
        rescale_rows(o[b], rescale);
        pack_probabilities<kType>(weights[b], s[b]);
      }

      ptx::cp_async_wait<0>();
      __syncthreads();
      if (tile > item.tile_begin) load_kv(shared_k, p.k, tile - 1);

#pragma unroll
      for (std::int32_t step = 0; step < kTile.tokens / 16; ++step) {
#pragma unroll
        for (std::int32_t j = 0; j < kOutBlocks; j += 2) {
          std::uint32_t values[4];  // dimensions 8j..8j+7 and the eight after them
          ptx::ldmatrix_x4_trans(values, shared_v + (lane_qv ^ static_cast<std::uint32_t>(j * 16)) +
                                             static_cast<std::uint32_t>(step * 16 * kHeadDim * 2));
#pragma unroll
          for (std::int32_t b = 0; b < kRowBlocks; ++b) {
            ptx::mma_m16n8k16<kType>(&o[b][4 * j], &weights[b][4 * step], values[0], values[1]);
            ptx::mma_m16n8k16<kType>(&o[b][4 * j + 4], &weights[b][4 * step], values[2], values[3]);
          }
        }
      }
    }

#pragma unroll
    for (std::int32_t b = 0; b < kRowBlocks; ++b) {
      store_item_rows<kType, kTile.rows>(p.output, item, o[b], row_max[b], row_sum[b], p.scale_log2,
                                         warp_row + 16 * b + lane / 4, lane);
    }

    __syncthreads();  // everyone is done with the item and V; next_index is written
  }
}

}  // namespace compact
