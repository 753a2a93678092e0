// The mean-key rule of selector.h (packed tiles, visible kFull, row norm, vote max), one kernel from Q and means to
// mask words, for sm_90a: wgmma. A CTA owns a tile (mean_key_tile.cuh). Budget and figures:
// docs/design/step-kernels.md.
//
//   producer   one warp gathers stages of 64 means through the page table by cp.async, into the layout of wgmma
//   consumers  2 warpgroups of 64 rows: S = Q M^T with Q in registers, then sums and candidates of their rows
//   barriers   full[stage] and empty[stage], nothing CTA-wide between the first stage and the last. Two CTAs an SM
//              (head dimension 256: one): while one warpgroup waits for its products, the others take exponentials
//   row        sum in base 2 against a reference that follows the maximum only when it is left far behind
//   candidates a list per thread over the memory of its warp's queries, which are in registers by then: no atomics
//
// The vote is an OR of rows, so warps meet only in the mask words, by integer atomics: same input, same bits.
#include <cmath>
#include <cstdint>

#include "src/core/launch_kernel.h"
#include "src/ptx/control.cuh"
#include "src/ptx/cp_async.cuh"
#include "src/ptx/ldmatrix.cuh"
#include "src/ptx/log2.cuh"
#include "src/ptx/mbarrier.cuh"
#include "src/ptx/quad.cuh"
#include "src/ptx/shared_address.cuh"
#include "src/ptx/smem_descriptor.cuh"
#include "src/ptx/wgmma.cuh"
#include "src/select/cuda/mean_key_tile.cuh"

namespace compact {
namespace {

constexpr std::int32_t kRows = kMeanKeyRows;
constexpr std::int32_t kPages = kMeanKeyPages;
constexpr std::int32_t kStages = 4;
constexpr std::int32_t kLag = 2;  // stages on their way before the producer waits for the first of them
constexpr std::int32_t kConsumerWarps = kRows / 16;
constexpr std::int32_t kConsumers = 32 * kConsumerWarps;
constexpr std::int32_t kThreads = kConsumers + 32;
constexpr std::int32_t kPanelBytes = kPages * ptx::kSwizzleRowBytes;
// A sum whose reference is 16 below the maximum holds terms of 2^16: far from the limits of fp32.
constexpr float kReferenceSlackLog2 = 16.0f;

enum NamedBarrier { kFirstPassDone = 1, kWordsDone = 2 };

struct Candidate {
  float score;
  std::uint32_t page_and_row;  // 0: the thread's first row, 1: the second
};

struct Shared {
  MeanKeyTile tile;
  std::uint64_t full[kStages];   // arrivals: lanes of the producer, whose copies have landed
  std::uint64_t empty[kStages];  // arrivals: consumer warps
  std::int32_t num_bad_rows;
  std::int32_t lists_overflowed;
};

template <std::int32_t kHeadDim>
struct Sm90Shape {
  static constexpr std::int32_t kCtasPerSm = kHeadDim == 256 ? 1 : 2;
  static constexpr std::int32_t kStageBytes = kPages * kHeadDim * 2;
  static constexpr std::int32_t kWarpQueryBytes = 16 * kHeadDim * 2;
  static constexpr std::int32_t kWarpBytes = kWarpQueryBytes < 4096 ? 4096 : kWarpQueryBytes;  // queries, candidates
  static constexpr std::int32_t kThreadCandidates = kWarpBytes / 32 / static_cast<std::int32_t>(sizeof(Candidate));
  static constexpr std::int32_t kSharedAt = kStages * kStageBytes + kConsumerWarps * kWarpBytes;
  static constexpr std::int32_t kWordsAt = kSharedAt + static_cast<std::int32_t>(sizeof(Shared));

  static constexpr std::int32_t smem_bytes(std::int32_t words_per_row) { return kWordsAt + words_per_row * 8; }
};

// A pass of the producer. `stages_before`: stages of the pass before, which the barriers have counted.
template <std::int32_t kHeadDim>
__device__ __forceinline__ void gather_means(const MeanKeyArgs& args, Shared& shared, std::uint32_t ring,
                                             std::int32_t stages_before) {
  constexpr std::int32_t kPieces = kHeadDim / 8;       // of 16 bytes
  constexpr std::int32_t kRowsPerCopy = 32 / kPieces;  // pages that the warp copies at once
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x) % 32;
  const std::int32_t piece = lane % kPieces;
  const std::int32_t lane_row = lane / kPieces;
  const std::int32_t* table = shared.tile.table;
  const std::int32_t end = shared.tile.end;
  const std::int32_t num_stages = shared.tile.num_stages();
  const std::int32_t page_elements = args.num_kv_heads * kHeadDim;
  const std::uint16_t* means = args.mean_k + shared.tile.kv_head * kHeadDim + piece * 8;
  const std::uint32_t lane_offset =
      static_cast<std::uint32_t>(piece / 8 * kPanelBytes) +
      ptx::swizzle_128b(static_cast<std::uint32_t>(lane_row), static_cast<std::uint32_t>(piece % 8 * 16));
  const auto page_at = [&](std::int32_t j) { return j < end ? table[j] : -1; };
  std::int32_t low = page_at(lane), high = page_at(32 + lane);  // ids of a stage, on their way a stage ahead
  for (std::int32_t u = 0; u < num_stages + kLag; ++u) {
    const std::int32_t count = stages_before + u;
    if (u < num_stages) {
      const std::int32_t ids[2] = {low, high};
      low = page_at((u + 1) * kPages + lane);
      high = page_at((u + 1) * kPages + 32 + lane);
      ptx::mbarrier_wait(&shared.empty[count % kStages], static_cast<std::uint32_t>(count / kStages & 1) ^ 1);
      const std::uint32_t to =
          ring + static_cast<std::uint32_t>(count % kStages * Sm90Shape<kHeadDim>::kStageBytes) + lane_offset;
#pragma unroll
      for (std::int32_t row = 0; row < kPages; row += kRowsPerCopy) {  // this lane's: row + lane_row
        const std::int32_t page = __shfl_sync(0xffffffffu, ids[row / 32], row % 32 + lane_row);
        const bool valid = page >= 0;
        ptx::cp_async_16(
            (to ^ static_cast<std::uint32_t>((row & 7) << 4)) + static_cast<std::uint32_t>(row * ptx::kSwizzleRowBytes),
            means + (valid ? std::int64_t{page} * page_elements : 0), valid);
      }
    }
    ptx::cp_async_commit();
    if (u < kLag) continue;
    ptx::cp_async_wait<kLag>();
    ptx::fence_proxy_async_shared();
    ptx::mbarrier_arrive(&shared.full[(count - kLag) % kStages]);
  }
}

// This warp's 16 query rows as fragments; rows that do not exist are zeros.
template <std::int32_t kHeadDim>
__device__ __forceinline__ void load_queries(std::uint32_t (&q)[kHeadDim / 4], const MeanKeyArgs& args,
                                             const MeanKeyTile& tile, std::uint32_t shared, std::int32_t first_row) {
  constexpr std::int32_t kPieces = kHeadDim / 8;
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x) % 32;
  const std::int32_t inverse_group = (65535 + args.group) / args.group;  // row / G = row * this >> 16 below 128
#pragma unroll
  for (std::int32_t i = 0; i < 16 * kPieces / 32; ++i) {
    const std::int32_t at = i * 32 + lane;
    const std::int32_t row = first_row + at / kPieces;
    const bool valid = row < tile.rows;
    const std::int32_t token = row * inverse_group >> 16;
    const std::int32_t head = tile.kv_head * args.group + row - token * args.group;
    const std::int64_t from = valid ? (tile.q_begin + token) * args.q_token_stride + head * args.q_head_stride : 0;
    ptx::cp_async_16(shared + ptx::swizzled_piece_offset<kHeadDim>(at / kPieces, at % kPieces),
                     args.q + from + at % kPieces * 8, valid);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  const std::uint32_t from = shared + ptx::swizzled_piece_offset<kHeadDim>(lane % 16, lane / 16);
#pragma unroll
  for (std::int32_t step = 0; step < kHeadDim / 16; ++step) {
    ptx::ldmatrix_x4(&q[4 * step], from ^ static_cast<std::uint32_t>(step * 32));
  }
  __syncwarp();
}

// Two rows of a thread: first_row + lane / 4 and 8 more.
struct RowSums {
  float reference[2] = {-INFINITY, -INFINITY};  // a score, the same in a quad
  float shift[2] = {0, 0};                      // scaled; 0 while there is no reference
  float sum[2] = {0, 0};                        // of 2^(scaled score - shift), of this thread's columns
};

// Adds a stage of scores, whose largest of this thread are known.
__device__ __forceinline__ void add_scores(RowSums& rows, const float (&s)[kPages / 2], const float (&largest)[2],
                                           const MeanKeyArgs& args) {
  float limit[2];
#pragma unroll
  for (std::int32_t h = 0; h < 2; ++h) {
    limit[h] = fmaf(kReferenceSlackLog2, args.inverse_scale, rows.reference[h]);
  }
  if (__any_sync(0xffffffffu, largest[0] > limit[0] || largest[1] > limit[1])) {
#pragma unroll
    for (std::int32_t h = 0; h < 2; ++h) {
      const float row_largest = ptx::quad_max(largest[h]);
      if (!(row_largest > limit[h])) continue;
      const float shift = row_largest * args.scale_log2;
      // Before the first reference the sum is 0, or NaN for good.
      if (rows.reference[h] != -INFINITY) rows.sum[h] *= ptx::fast_exp2(rows.shift[h] - shift);
      rows.reference[h] = row_largest;
      rows.shift[h] = shift;
    }
  }
#pragma unroll
  for (std::int32_t h = 0; h < 2; ++h) {
    float even = rows.sum[h], odd = 0.0f;
#pragma unroll
    for (std::int32_t i = 2 * h; i < kPages / 2; i += 4) {
      even += ptx::fast_exp2(fmaf(s[i], args.scale_log2, -rows.shift[h]));
      odd += ptx::fast_exp2(fmaf(s[i + 1], args.scale_log2, -rows.shift[h]));
    }
    rows.sum[h] = even + odd;
  }
}

// Calls found(score, page, h) for the scores of rows h = 0, 1 that reach cut[h], page below `past_pages`. `largest` of
// groups of 16 pages, so that a stage without a hit costs eight comparisons.
template <class Found>
__device__ __forceinline__ void find_hits(const float (&s)[kPages / 2], const float (&group_largest)[2][kPages / 16],
                                          const float (&cut)[2], std::int32_t first_page, std::int32_t past_pages,
                                          Found&& found) {
#pragma unroll
  for (std::int32_t g = 0; g < kPages / 16; ++g) {
#pragma unroll
    for (std::int32_t h = 0; h < 2; ++h) {
      if (!(group_largest[h][g] >= cut[h])) continue;
#pragma unroll
      for (std::int32_t k = 0; k < 4; ++k) {
        const float score = s[8 * g + 4 * (k / 2) + 2 * h + k % 2];
        const std::int32_t page = first_page + 16 * g + 8 * (k / 2) + k % 2;
        if (score >= cut[h] && page < past_pages) found(score, page, h);
      }
    }
  }
}

// A consumer warpgroup: both passes and the tile's mask words.
template <ptx::MmaType kType, std::int32_t kHeadDim>
__device__ __forceinline__ void select_pages(const MeanKeyArgs& args, Shared& shared, unsigned char* memory) {
  using Shape = Sm90Shape<kHeadDim>;
  using Mma = ptx::Wgmma<kType, kPages>;
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  const std::int32_t lane = thread % 32, warp = thread / 32;
  const MeanKeyTile& tile = shared.tile;
  const std::int32_t past_pages = tile.past_pages, num_stages = tile.num_stages();
  unsigned char* own = memory + kStages * Shape::kStageBytes + warp * Shape::kWarpBytes;
  auto* words = reinterpret_cast<unsigned*>(memory + Shape::kWordsAt);  // [2 * words_per_row]

  for (std::int32_t w = thread; w < 2 * args.words_per_row; w += kConsumers) words[w] = 0;
  std::uint32_t q[kHeadDim / 4];
  load_queries<kHeadDim>(q, args, tile, ptx::shared_address(own), 16 * warp);
  const ptx::SmemDescriptor means = ptx::k_major_descriptor(ptx::shared_address(memory));

  const bool row_exists[2] = {16 * warp + lane / 4 < tile.rows, 16 * warp + lane / 4 + 8 < tile.rows};
  Candidate* const list = reinterpret_cast<Candidate*>(own) + lane;  // entries 32 apart
  std::int32_t num_candidates = 0;  // more than there is room for: the list is worth nothing
  std::int32_t num_scored = tile.end;
  const float margin = tile.candidate_margin;
  RowSums rows;
  float cut[2];
  float s[kPages / 2];  // products without the scale

  // Scores of stage u, the `count`th of the kernel, and the largest of each row and 16 pages.
  float group_largest[2][kPages / 16];
  const auto score_stage = [&](std::int32_t u, std::int32_t count) {
    const std::int32_t stage = count % kStages;
    ptx::mbarrier_wait(&shared.full[stage], static_cast<std::uint32_t>(count / kStages & 1));
    const ptx::SmemDescriptor from = means.advanced(stage * Shape::kStageBytes).uniform();
#pragma unroll
    for (float& x : s) x = 0.0f;  // otherwise the scores before count as live
    ptx::pin_registers(s);
    ptx::wgmma_fence();
#pragma unroll
    for (std::int32_t step = 0; step < kHeadDim / 16; ++step) {
      Mma::template rs<false>(s, &q[4 * step], from.advanced(step / 4 * kPanelBytes + step % 4 * 32).bits(), step > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::pin_registers(s);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&shared.empty[stage]);

    if ((u + 1) * kPages > past_pages) {
      const std::uint64_t scored = scored_pages(args, tile, u * kPages, lane);
      num_scored -= num_unscored(tile, u * kPages, scored);
      const std::uint64_t of_lane = scored >> (lane % 4 * 2);
#pragma unroll
      for (std::int32_t i = 0; i < kPages / 2; ++i) {
        if ((of_lane >> (i / 4 * 8 + i % 2) & 1) == 0) s[i] = -INFINITY;
      }
    }
#pragma unroll
    for (std::int32_t h = 0; h < 2; ++h) {
#pragma unroll
      for (std::int32_t g = 0; g < kPages / 16; ++g) {
        const float* from_group = &s[8 * g + 2 * h];
        group_largest[h][g] = fmaxf(fmaxf(from_group[0], from_group[1]), fmaxf(from_group[4], from_group[5]));
      }
    }
  };

#pragma unroll 1
  for (std::int32_t u = 0; u < num_stages; ++u) {
    score_stage(u, u);
    float largest[2];
#pragma unroll
    for (std::int32_t h = 0; h < 2; ++h) {
      largest[h] =
          fmaxf(fmaxf(group_largest[h][0], group_largest[h][1]), fmaxf(group_largest[h][2], group_largest[h][3]));
    }
    add_scores(rows, s, largest, args);
#pragma unroll
    for (std::int32_t h = 0; h < 2; ++h) {
      const float running =
          fmaf(ptx::fast_log2(ptx::quad_sum(rows.sum[h])) + margin, args.inverse_scale, rows.reference[h]);
      cut[h] = row_exists[h] ? running : INFINITY;
    }
    find_hits(s, group_largest, cut, u * kPages + lane % 4 * 2, past_pages,
              [&](float score, std::int32_t page, std::int32_t h) {
                if (num_candidates < Shape::kThreadCandidates) {
                  list[32 * num_candidates] = {score, static_cast<std::uint32_t>(page << 1 | h)};
                }
                ++num_candidates;
              });
  }

  // Final cuts. A row without a finite, positive sum has a NaN or +inf score, or -inf only.
  const float threshold = MeanKeyTile::threshold(args, num_scored);
#pragma unroll
  for (std::int32_t h = 0; h < 2; ++h) {
    const float sum = ptx::quad_sum(rows.sum[h]);
    const float last = fmaf(log2f(sum) + log2f(threshold), args.inverse_scale, rows.reference[h]);
    cut[h] = row_exists[h] ? last : INFINITY;
    if (lane % 4 == 0 && row_exists[h] && !(sum > 0.0f && sum < INFINITY)) atomicAdd(&shared.num_bad_rows, 1);
  }
  if (num_candidates > Shape::kThreadCandidates) shared.lists_overflowed = 1;
  ptx::named_barrier_sync(kFirstPassDone, kThreads);
  const std::int32_t num_bad_rows = shared.num_bad_rows;
  const auto want = [&](std::uint32_t page) { atomicOr(&words[page / 32], 1u << page % 32); };
  if (num_bad_rows == 0 && shared.lists_overflowed != 0) {
#pragma unroll 1
    for (std::int32_t u = 0; u < num_stages; ++u) {
      score_stage(u, num_stages + u);
      find_hits(s, group_largest, cut, u * kPages + lane % 4 * 2, past_pages,
                [&](float, std::int32_t page, std::int32_t) { want(static_cast<std::uint32_t>(page)); });
    }
  } else if (num_bad_rows == 0) {
#pragma unroll 1
    for (std::int32_t i = 0; i < num_candidates; ++i) {
      const Candidate candidate = list[32 * i];
      if (candidate.score >= ((candidate.page_and_row & 1) == 0 ? cut[0] : cut[1])) want(candidate.page_and_row >> 1);
    }
  }
  ptx::named_barrier_sync(kWordsDone, kConsumers);
  for (std::int32_t w = thread; w < args.words_per_row; w += kConsumers) {
    tile.mask_row[w] =
        num_bad_rows > 0 ? bits_in_word(0, past_pages, w) : std::uint64_t{words[2 * w + 1]} << 32 | words[2 * w];
  }
  if (thread == 0 && num_bad_rows > 0 && args.nonfinite_rows != nullptr) {
    atomicAdd(args.nonfinite_rows, static_cast<unsigned long long>(num_bad_rows));
  }
}

template <ptx::MmaType kType, std::int32_t kHeadDim>
__global__ void __launch_bounds__(kThreads, Sm90Shape<kHeadDim>::kCtasPerSm)
    mean_key_sm90_kernel(const __grid_constant__ MeanKeyArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = Sm90Shape<kHeadDim>;
  // The swizzle needs the stages on a multiple of 1024 bytes: the kernel has no static shared memory. Better a trap
  // than wrong numbers should that ever change.
  extern __shared__ __align__(1024) unsigned char memory[];
  if (ptx::shared_address(memory) % ptx::kSwizzleAtomBytes != 0) __trap();
  auto& shared = *reinterpret_cast<Shared*>(memory + Shape::kSharedAt);
  if (threadIdx.x == 0) {
    for (std::int32_t stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 32);
      ptx::mbarrier_init(&shared.empty[stage], kConsumerWarps);
    }
    shared.num_bad_rows = 0;
    shared.lists_overflowed = 0;
  }
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const auto tile_idx = static_cast<std::int32_t>(blockIdx.x);
  if (tile_idx >= args.tables.header->num_blocks * args.num_kv_heads) return;
  if (threadIdx.x == 0) shared.tile = find_tile(args, tile_idx);
  __syncthreads();
  const MeanKeyTile& tile = shared.tile;
  if (tile.rows == 0) return;
  if (args.share <= 0 || tile.past_pages == 0) {  // nothing to compare: all past pages, of which there may be none
    for (auto w = static_cast<std::int32_t>(threadIdx.x); w < args.words_per_row; w += kThreads) {
      tile.mask_row[w] = bits_in_word(0, tile.past_pages, w);
    }
    return;
  }
  if (threadIdx.x < kConsumers) {
    select_pages<kType, kHeadDim>(args, shared, memory);
    return;
  }
  const std::uint32_t ring = ptx::shared_address(memory);
  gather_means<kHeadDim>(args, shared, ring, 0);
  ptx::named_barrier_sync(kFirstPassDone, kThreads);
  if (shared.num_bad_rows == 0 && shared.lists_overflowed != 0) {
    gather_means<kHeadDim>(args, shared, ring, tile.num_stages());
  }
#endif
}

template <std::int32_t kHeadDim>
cudaError_t launch(const MeanKeyArgs& args, cudaStream_t stream) {
  const auto kernel = args.dtype == DType::kF16 ? mean_key_sm90_kernel<ptx::MmaType::kF16, kHeadDim>
                                                : mean_key_sm90_kernel<ptx::MmaType::kBf16, kHeadDim>;
  const std::int32_t smem_bytes = Sm90Shape<kHeadDim>::smem_bytes(args.words_per_row);
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, args.max_blocks * args.num_kv_heads, kThreads, smem_bytes, true, stream, args);
}

}  // namespace

cudaError_t launch_mean_key_sm90(const MeanKeyArgs& args, cudaStream_t stream) {
  switch (args.head_dim) {
    case 64: return launch<64>(args, stream);
    case 128: return launch<128>(args, stream);
    case 256: return launch<256>(args, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace compact
