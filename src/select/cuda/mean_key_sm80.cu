// The mean-key rule of selector.h (packed tiles, visible kFull, row norm, vote max), one kernel from Q and means to
// mask words, for every device from sm_80 on: cp.async and mma.sync. A CTA owns a tile (mean_key_tile.cuh).
//
//   warps      4 of 32 rows (head dimension 256: 8 of 16): a fragment of means read from shared memory serves 2 MMAs
//   Q          fragments in registers, loaded once through stages 1 and 2 of the ring
//   ring       3 stages of 64 means, gathered through the page table by cp.async
//   row        maximum and sum in base 2, as in flash attention; nothing is rescaled but the sum
//   candidates what reaches a row's running cut goes to a list of the warp, 24 to 32 entries a row, and is judged again
//              at the end. A full list costs the tile a second pass over all pages
//
// The vote is an OR of rows, so warps meet only in the mask words, by integer atomics: same input, same bits.
#include <cmath>
#include <cstdint>

#include "src/core/launch_kernel.h"
#include "src/ptx/control.cuh"
#include "src/ptx/cp_async.cuh"
#include "src/ptx/ldmatrix.cuh"
#include "src/ptx/quad.cuh"
#include "src/ptx/shared_address.cuh"
#include "src/select/cuda/mean_key_tile.cuh"
#include "src/select/cuda/score_columns.cuh"

namespace compact {
namespace {

constexpr std::int32_t kRows = kMeanKeyRows;
constexpr std::int32_t kPages = kMeanKeyPages;
constexpr std::int32_t kStages = 3;
constexpr std::int32_t kCandidates = 3072;  // room of the tile, shared out evenly to the warps

struct Candidate {
  float score;
  std::uint32_t row_and_page;  // row in the warp in the low 5 bits
};

template <std::int32_t kHeadDim>
struct Sm80Shape {
  static constexpr std::int32_t kRowBlocks = kHeadDim == 256 ? 1 : 2;  // m16 blocks of a warp
  static constexpr std::int32_t kWarps = kRows / 16 / kRowBlocks;
  static constexpr std::int32_t kThreads = 32 * kWarps;
  static constexpr std::int32_t kStageBytes = kPages * kHeadDim * 2;
  static constexpr std::int32_t kWarpCandidates = kCandidates / kWarps;
  static constexpr std::int32_t kCtasPerSm = kHeadDim == 256 ? 1 : 3;

  static constexpr std::int32_t smem_bytes(std::int32_t words_per_row) {
    return kStages * kStageBytes + kCandidates * static_cast<std::int32_t>(sizeof(Candidate)) + words_per_row * 8;
  }
};

// Starts the copy of the means of pages [first, first + kPages); past the end and outside the cache: zeros.
template <std::int32_t kHeadDim>
__device__ __forceinline__ void load_means(std::uint32_t shared, const MeanKeyArgs& args, const MeanKeyTile& tile,
                                           std::int32_t first) {
  constexpr std::int32_t kPieces = kHeadDim / 8;
  constexpr std::int32_t kRowsPerPass = Sm80Shape<kHeadDim>::kThreads / kPieces;
  constexpr std::int32_t kPasses = kPages / kRowsPerPass;
  std::int32_t thread = static_cast<std::int32_t>(threadIdx.x);
  asm volatile("" : "+r"(thread), "+r"(first));  // opaque: nothing derived from it is kept from stage to stage
  const std::int32_t piece = thread % kPieces;
  const std::int32_t first_row = thread / kPieces;
  const std::uint16_t* means = args.mean_k + tile.kv_head * kHeadDim + piece * 8;
  const std::int64_t page_stride = std::int64_t{args.num_kv_heads} * kHeadDim;
  constexpr std::int32_t kGroup = 4;  // ids of a group first: one wait for the table instead of one per row
  static_assert(kPasses % kGroup == 0, "groups fill the passes evenly");
#pragma unroll
  for (std::int32_t group = 0; group < kPasses; group += kGroup) {
    std::int32_t page[kGroup];
#pragma unroll
    for (std::int32_t i = 0; i < kGroup; ++i) {
      const std::int32_t j = first + first_row + (group + i) * kRowsPerPass;
      page[i] = j < tile.end ? tile.table[j] : -1;
    }
#pragma unroll
    for (std::int32_t i = 0; i < kGroup; ++i) {
      const std::int32_t row = first_row + (group + i) * kRowsPerPass;
      const bool valid = page[i] >= 0;
      ptx::cp_async_16(shared + ptx::swizzled_piece_offset<kHeadDim>(row, piece),
                       means + (valid ? page[i] * page_stride : 0), valid);
    }
  }
}

template <ptx::MmaType kType, std::int32_t kHeadDim>
__global__ void __launch_bounds__(Sm80Shape<kHeadDim>::kThreads, Sm80Shape<kHeadDim>::kCtasPerSm)
    mean_key_sm80_kernel(const MeanKeyArgs args) {
  using Shape = Sm80Shape<kHeadDim>;
  constexpr std::int32_t kRowBlocks = Shape::kRowBlocks;
  constexpr std::int32_t kSteps = kHeadDim / 16;

  // Aligned to more than a row, so that fragment loops may flip address bits within one.
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  __shared__ MeanKeyTile tile;
  __shared__ std::int32_t num_scored;  // pages before the end that have a mean
  __shared__ float cuts[kRows];
  __shared__ std::int32_t num_candidates[Shape::kWarps];
  __shared__ std::int32_t num_bad_rows;
  const std::uint32_t ring = ptx::shared_address(shared_memory);
  auto* candidates = reinterpret_cast<Candidate*>(shared_memory + kStages * Shape::kStageBytes);
  auto* words = reinterpret_cast<unsigned*>(candidates + kCandidates);  // [2 * words_per_row]

  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const auto tile_idx = static_cast<std::int32_t>(blockIdx.x);
  if (tile_idx >= args.tables.header->num_blocks * args.num_kv_heads) return;
  if (threadIdx.x == 0) {
    const std::int32_t block_idx = tile_idx / args.num_kv_heads;  // KV heads of a block side by side
    tile = find_tile(args, block_idx, tile_idx - block_idx * args.num_kv_heads);
    num_scored = tile.end;
    num_bad_rows = 0;
  }
  __syncthreads();
  if (tile.rows == 0) return;

  auto thread = static_cast<std::int32_t>(threadIdx.x);
  if (tile.share <= 0 || tile.past_pages == 0) {  // nothing to compare: all past pages, of which there may be none
    for (std::int32_t w = thread; w < args.words_per_row; w += Shape::kThreads) {
      tile.mask_row[w] = bits_in_word(0, tile.past_pages, w);
    }
    return;
  }

  const auto lane = [&] { return thread % 32; };
  const auto warp = [&] { return thread / 32; };
  const auto warp_row = [&] { return thread / 32 * kRowBlocks * 16; };
  const auto row_of = [&](std::int32_t b, std::int32_t h) { return warp_row() + 16 * b + 8 * h + lane() / 4; };
  load_means<kHeadDim>(ring, args, tile, 0);
  load_packed_queries<kHeadDim, kRows, Shape::kThreads>(ring + Shape::kStageBytes, args.q, args.q_token_stride,
                                                        args.q_head_stride, tile.q_begin, tile.kv_head * args.group,
                                                        args.group, tile.rows);
  ptx::cp_async_commit();
  for (std::int32_t w = thread; w < 2 * args.words_per_row; w += Shape::kThreads) words[w] = 0;
  if (lane() == 0) num_candidates[warp()] = 0;

  ptx::cp_async_wait<0>();
  __syncthreads();
  std::uint32_t q[kRowBlocks][kSteps][4];
  load_fragments<kHeadDim, kRowBlocks>(q, ring + Shape::kStageBytes, warp_row(), lane());
  __syncthreads();  // stages 1 and 2 are free

  // Scores are products without the scale; row b, h of this thread is warp_row + 16 b + 8 h + lane / 4.
  float row_max[kRowBlocks][2], row_sum[kRowBlocks][2];  // the sum of this thread's columns
#pragma unroll
  for (std::int32_t b = 0; b < kRowBlocks; ++b) {
    row_max[b][0] = row_max[b][1] = -INFINITY;
    row_sum[b][0] = row_sum[b][1] = 0.0f;
  }

  for (std::int32_t pass = 0; pass < 2; ++pass) {
    if (pass == 1) load_means<kHeadDim>(ring, args, tile, 0), ptx::cp_async_commit();
    if (tile.num_stages() > 1) load_means<kHeadDim>(ring + Shape::kStageBytes, args, tile, kPages);
    ptx::cp_async_commit();
    for (std::int32_t u = 0; u < tile.num_stages(); ++u) {
      ptx::cp_async_wait<1>();
      __syncthreads();  // stage u landed for everyone, and everyone is done with stage u - 1
      if (u + 2 < tile.num_stages()) {
        load_means<kHeadDim>(ring + static_cast<std::uint32_t>((u + 2) % kStages * Shape::kStageBytes), args, tile,
                             (u + 2) * kPages);
      }
      ptx::cp_async_commit();

      asm volatile("" : "+r"(thread));  // opaque: what is derived from it would take registers from stage to stage
      float s[kRowBlocks][kPages / 2] = {};
      multiply_stage<kType, kHeadDim, kRowBlocks>(
          s, q, ring + static_cast<std::uint32_t>(u % kStages * Shape::kStageBytes), lane());

      const std::int32_t first_page =
          u * kPages + lane() % 4 * 2;  // of this thread's columns; column i / 4 * 8 + i % 2
      if ((u + 1) * kPages > tile.past_pages) {
        const std::uint64_t scored = scored_pages(args, tile, u * kPages, lane());
        if (pass == 0 && thread == 0) num_scored -= num_unscored(tile, u * kPages, scored);
        const std::uint64_t own = scored >> (lane() % 4 * 2);
#pragma unroll
        for (std::int32_t b = 0; b < kRowBlocks; ++b) {
#pragma unroll
          for (std::int32_t i = 0; i < kPages / 2; ++i) {
            if ((own >> (i / 4 * 8 + i % 2) & 1) == 0) s[b][i] = -INFINITY;
          }
        }
      }

#pragma unroll
      for (std::int32_t b = 0; b < kRowBlocks; ++b) {
#pragma unroll
        for (std::int32_t h = 0; h < 2; ++h) {
          float largest = fmaxf(s[b][2 * h], s[b][2 * h + 1]);
#pragma unroll
          for (std::int32_t i = 4 + 2 * h; i < kPages / 2; i += 4)
            largest = fmaxf(largest, fmaxf(s[b][i], s[b][i + 1]));
          float cut;
          if (pass == 0) {
            const float new_max = fmaxf(row_max[b][h], ptx::quad_max(largest));
            const float shift = new_max == -INFINITY ? 0.0f : new_max * args.scale_log2;
            float sum_even = row_sum[b][h] * ptx::fast_exp2(fmaf(row_max[b][h], args.scale_log2, -shift)),
                  sum_odd = 0.0f;
#pragma unroll
            for (std::int32_t i = 2 * h; i < kPages / 2; i += 4) {
              sum_even += ptx::fast_exp2(fmaf(s[b][i], args.scale_log2, -shift));
              sum_odd += ptx::fast_exp2(fmaf(s[b][i + 1], args.scale_log2, -shift));
            }
            row_max[b][h] = new_max;
            row_sum[b][h] = sum_even + sum_odd;
            cut = fmaf(__log2f(ptx::quad_sum(row_sum[b][h])) + tile.candidate_margin, args.inverse_scale, new_max);
          } else {
            cut = cuts[row_of(b, h)];
          }
          if (!(largest >= cut) || row_of(b, h) >= tile.rows) continue;
#pragma unroll
          for (std::int32_t k = 0; k < kPages / 4; ++k) {
            const float score = s[b][k / 2 * 4 + 2 * h + k % 2];
            const std::int32_t page = first_page + k / 2 * 8 + k % 2;
            if (!(score >= cut) || page >= tile.past_pages) continue;
            if (pass == 0) {
              const std::int32_t at = atomicAdd(&num_candidates[warp()], 1);
              if (at < Shape::kWarpCandidates) {
                candidates[warp() * Shape::kWarpCandidates + at] = {
                    score, static_cast<std::uint32_t>(page << 5 | (row_of(b, h) - warp_row()))};
              }
            } else {
              atomicOr(&words[page / 32], 1u << page % 32);
            }
          }
        }
      }
    }
    if (pass == 1) break;

    __syncthreads();  // num_scored
    // Final cuts. A row without a finite, positive sum has a NaN or +inf score, or -inf only.
    const float threshold = tile.threshold(args, num_scored);
#pragma unroll
    for (std::int32_t b = 0; b < kRowBlocks; ++b) {
#pragma unroll
      for (std::int32_t h = 0; h < 2; ++h) {
        const float sum = ptx::quad_sum(row_sum[b][h]);
        if (lane() % 4 != 0) continue;
        cuts[row_of(b, h)] = fmaf(log2f(sum) + log2f(threshold), args.inverse_scale, row_max[b][h]);
        if (!(sum > 0.0f && sum < INFINITY) && row_of(b, h) < tile.rows) atomicAdd(&num_bad_rows, 1);
      }
    }
    __syncwarp();  // the warp's candidates are counted
    const bool overflow = __syncthreads_or(num_candidates[warp()] > Shape::kWarpCandidates) != 0;
    if (num_bad_rows > 0) break;
    if (overflow) continue;
    for (std::int32_t i = lane(); i < num_candidates[warp()]; i += 32) {
      const Candidate candidate = candidates[warp() * Shape::kWarpCandidates + i];
      if (!(candidate.score >= cuts[warp_row() + static_cast<std::int32_t>(candidate.row_and_page & 31)])) continue;
      const std::uint32_t page = candidate.row_and_page >> 5;
      atomicOr(&words[page / 32], 1u << page % 32);
    }
    break;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (std::int32_t w = thread; w < args.words_per_row; w += Shape::kThreads) {
    tile.mask_row[w] =
        num_bad_rows > 0 ? bits_in_word(0, tile.past_pages, w) : std::uint64_t{words[2 * w + 1]} << 32 | words[2 * w];
  }
  if (thread == 0 && num_bad_rows > 0 && args.nonfinite_rows != nullptr) {
    atomicAdd(args.nonfinite_rows, static_cast<unsigned long long>(num_bad_rows));
  }
}

template <std::int32_t kHeadDim>
cudaError_t launch(const MeanKeyArgs& args, bool pdl, cudaStream_t stream) {
  using Shape = Sm80Shape<kHeadDim>;
  const auto kernel = args.dtype == DType::kF16 ? mean_key_sm80_kernel<ptx::MmaType::kF16, kHeadDim>
                                                : mean_key_sm80_kernel<ptx::MmaType::kBf16, kHeadDim>;
  const std::int32_t smem_bytes = Shape::smem_bytes(args.words_per_row);
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, args.max_blocks * args.num_kv_heads, Shape::kThreads, smem_bytes, pdl, stream, args);
}

}  // namespace

cudaError_t launch_mean_key_sm80(const MeanKeyArgs& args, bool pdl, cudaStream_t stream) {
  switch (args.head_dim) {
    case 64: return launch<64>(args, pdl, stream);
    case 128: return launch<128>(args, pdl, stream);
    case 256: return launch<256>(args, pdl, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace compact
