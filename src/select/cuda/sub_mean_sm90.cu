// Scores of `sub-mean` for sm_90a and pages of 128 tokens: every product once. Budget and figures:
// docs/design/step-kernels.md.
//
//   CTA        one an SM, walks over pairs of tiles (neighbouring query blocks of a KV head, 256 rows): a mean that is
//              fetched serves all of them
//   producers  4 warps gather stages of 32 pages, 128 means, through the page table by cp.async
//   consumers  2 warpgroups, a tile each, in two blocks of 64 rows: while one block's products are under way, the
//              exponentials of the other are taken
//   scores     what a page's means weigh in a row, 2^(score - shift), stays as fp16 beside the shift of (row, stage),
//              since 128 rows x pages do not fit an SM. It goes to a place of the CTA in scratch that stays in L2
//   at the end the row's log-sum-exp is known; a thread for each eight pages joins the rows in order
//
// A weight is rounded to 11 bits, and one below 2^-25 of the row's largest is 0. Same input, same bits.
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <numbers>

#include "src/core/launch_kernel.h"
#include "src/ptx/control.cuh"
#include "src/ptx/cp_async.cuh"
#include "src/ptx/log2.cuh"
#include "src/ptx/mbarrier.cuh"
#include "src/ptx/quad.cuh"
#include "src/ptx/shared_address.cuh"
#include "src/ptx/smem_descriptor.cuh"
#include "src/ptx/wgmma.cuh"
#include "src/select/cuda/sub_mean_sm90.h"

namespace compact {
namespace {

constexpr std::int32_t kTileRows = 128;
constexpr std::int32_t kTiles = 2;
constexpr std::int32_t kBlockRows = 64;
constexpr std::int32_t kPageTokens = 128;
constexpr std::int32_t kGranuleLog2 = 5;  // tokens of a mean
constexpr std::int32_t kPageGranules = 4;
constexpr std::int32_t kStagePages = 32;
constexpr std::int32_t kColumns = kStagePages * kPageGranules;
constexpr std::int32_t kStages = 4;
constexpr std::int32_t kProducerWarps = 4;
constexpr std::int32_t kBatchRows = 16;  // that a thread reads at once at the end
constexpr std::int32_t kConsumerWarps = 4 * kTiles;
constexpr std::int32_t kConsumers = 32 * kConsumerWarps;
constexpr std::int32_t kTileThreads = kConsumers / kTiles;
constexpr std::int32_t kThreads = kConsumers + 32 * kProducerWarps;
constexpr std::int32_t kPanelBytes = kColumns * ptx::kSwizzleRowBytes;  // of a stage and of a tile's queries
constexpr float kLargestSum = 32768.0f;  // of a thread's weights in a stage and row: then the shift moves
static_assert(kColumns == kTileRows);

enum NamedBarrier { kTileDone = 1 };  // one for each tile

struct SubMeanArgs {
  StepQueries step;
  const std::uint16_t* sub_mean_k;  // [num_pages, Hkv, 4, D]
  std::int32_t num_kv_heads;
  std::int32_t group;
  std::int32_t max_stages;
  float scale_log2;
  float peak_weight;
  std::uint16_t* weights;  // [CTAs, tiles, rows, max_stages, 32]  fp16
  float* shifts;           // [CTAs, tiles, rows, max_stages]
  ScoreRows rows;
};

struct Shared {
  std::uint64_t full[kStages];        // arrivals: threads of the producers whose copies have landed
  std::uint64_t empty[kStages];       // arrivals: consumer warps
  float row_sums[kTiles][kTileRows];  // log2 of the row's sum; +inf: there is no such row
  float chunk_parts[kTiles][4];
  std::int32_t num_bad_rows[kTiles];
};

template <std::int32_t kHeadDim>
struct SubMeanShape {
  static constexpr std::int32_t kStageBytes = kColumns * kHeadDim * 2;
  static constexpr std::int32_t kQueriesAt = kStages * kStageBytes;
  static constexpr std::int32_t kQueryBytes = kTileRows * kHeadDim * 2;  // of a tile
  static constexpr std::int32_t kSharedAt = kQueriesAt + kTiles * kQueryBytes;
  static constexpr std::int32_t kSmemBytes = kSharedAt + static_cast<std::int32_t>(sizeof(Shared));
};

// A pair of tiles: what producers and consumers want to know alike.
struct Item {
  const BlockPair* pair;
  std::int32_t kv_head;
  std::int32_t past_pages;
  std::int32_t num_pages;   // that the last query reaches
  std::int32_t num_stages;  // 0: nothing to do

  __device__ __forceinline__ Item(const SubMeanArgs& args, std::int32_t index) {
    const std::int32_t place = index / args.num_kv_heads;
    kv_head = index - place * args.num_kv_heads;
    pair = &args.step.tables.pairs[place];
    past_pages = pair->chunk.chunk_start / kPageTokens;
    const QueryBlock* last = &pair->blocks[pair->num_blocks == 2 ? 1 : 0];
    const std::int32_t end = last->first_position + last->tokens;
    const bool chooses = pair->num_blocks > 0 && pair->chunk.is_short == 0 && past_pages > 0;
    num_pages = (end + kPageTokens - 1) / kPageTokens;
    num_stages = chooses ? ((end >> kGranuleLog2) + kColumns - 1) / kColumns : 0;
  }
};

// Row n of a stage holds mean n / 8 % 4 of this page of the stage, so that a lane's pairs of products are two pages
// side by side, and its eight pages follow each other.
__device__ __forceinline__ constexpr std::int32_t page_of_row(std::int32_t n) {
  return n % 8 / 2 * 8 + n / 32 * 2 + n % 2;
}

template <std::int32_t kHeadDim>
__device__ __forceinline__ void gather_means(const SubMeanArgs& args, Shared& shared, std::uint32_t ring,
                                             std::int32_t num_items) {
  using Shape = SubMeanShape<kHeadDim>;
  constexpr std::int32_t kPieces = kHeadDim / 8;
  constexpr std::int32_t kRowsPerCopy = 32 / kPieces;
  constexpr std::int32_t kWarpRows = kColumns / kProducerWarps;
  constexpr std::int32_t kCopies = kWarpRows / kRowsPerCopy;
  constexpr std::int32_t kGroup = 8;
  static_assert(kCopies % kGroup == 0, "groups fill the stage evenly");
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x) % 32;
  const std::int32_t warp = static_cast<std::int32_t>(threadIdx.x) / 32 - kConsumerWarps;
  const std::int32_t piece = lane % kPieces;
  std::int32_t first_row = warp * kWarpRows + lane / kPieces;
  const std::int64_t page_elements = std::int64_t{args.num_kv_heads} * kPageGranules * kHeadDim;
  std::int32_t count = 0;
#pragma unroll 1
  for (auto index = static_cast<std::int32_t>(blockIdx.x); index < num_items;
       index += static_cast<std::int32_t>(gridDim.x)) {
    const Item item(args, index);
    const std::int32_t* table = args.step.page_tables + item.pair->chunk.table_row * args.step.page_table_stride;
    const std::int32_t num_pages = item.num_pages;
    const std::uint16_t* means = args.sub_mean_k + std::int64_t{item.kv_head} * kPageGranules * kHeadDim + piece * 8;
    const auto id_of = [&](std::int32_t u) {
      const std::int32_t page = u * kStagePages + lane;
      return page < num_pages ? table[page] : -1;
    };
    std::int32_t next_id = item.num_stages > 0 ? id_of(0) : -1;
#pragma unroll 1
    for (std::int32_t u = 0; u < item.num_stages; ++u, ++count) {
      const std::int32_t id = next_id;
      if (u + 1 < item.num_stages) next_id = id_of(u + 1);
      asm volatile("" : "+r"(first_row));  // opaque: what is derived from it would take registers from stage to stage
      const std::int32_t stage = count % kStages;
      ptx::mbarrier_wait(&shared.empty[stage], static_cast<std::uint32_t>(count / kStages & 1) ^ 1);
      const std::uint32_t to = ring + static_cast<std::uint32_t>(stage * Shape::kStageBytes + piece / 8 * kPanelBytes);
#pragma unroll
      for (std::int32_t group = 0; group < kCopies; group += kGroup) {
        std::int32_t page[kGroup];  // ids first: a copy that waits for a shuffle keeps the next shuffle waiting
#pragma unroll
        for (std::int32_t i = 0; i < kGroup; ++i) {
          page[i] = __shfl_sync(0xffffffffu, id, page_of_row(first_row + (group + i) * kRowsPerCopy));
        }
#pragma unroll
        for (std::int32_t i = 0; i < kGroup; ++i) {
          const std::int32_t row = first_row + (group + i) * kRowsPerCopy;
          const bool valid = page[i] >= 0;
          const std::int64_t from = valid ? page[i] * page_elements + row / 8 % kPageGranules * kHeadDim : 0;
          ptx::cp_async_16(
              to + ptx::swizzle_128b(static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(piece % 8 * 16)),
              means + from, valid);
        }
      }
      ptx::cp_async_arrive(&shared.full[stage]);
    }
  }
}

__device__ __forceinline__ float2 half_floats(std::uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// The rows lane / 4 and 8 more of a block of 64, in a consumer thread.
struct RowState {
  float shift[2];  // of exponents, base 2; the same in a quad
  float sum[2];    // of weights relative to it, of this thread's columns
};

// Weights of the thread's eight pages in each of its rows, and their sums.
__device__ __forceinline__ void weigh(std::uint32_t (&weights)[2][4], float (&sum)[2], const float (&s)[64],
                                      const RowState& rows, float scale_log2) {
#pragma unroll
  for (std::int32_t h = 0; h < 2; ++h) {
    sum[h] = 0.0f;
#pragma unroll
    for (std::int32_t m = 0; m < 4; ++m) {
      float pages[2] = {0.0f, 0.0f};
#pragma unroll
      for (std::int32_t g = 0; g < kPageGranules; ++g) {
#pragma unroll
        for (std::int32_t e = 0; e < 2; ++e) {
          const float x = fmaf(s[4 * (4 * m + g) + 2 * h + e], scale_log2, -rows.shift[h]);
          pages[e] += ptx::fast_exp2(x);
        }
      }
      weights[h][m] = ptx::pack_pair<ptx::MmaType::kF16>(pages[0], pages[1]);
      sum[h] += pages[0] + pages[1];
    }
  }
}

// Moves the shifts up to the largest score of this stage; in the first stage, to it. NaN sums stay, +inf gives NaN.
__device__ __forceinline__ void move_shifts(RowState& rows, const float (&s)[64], float scale_log2, bool is_first) {
#pragma unroll
  for (std::int32_t h = 0; h < 2; ++h) {
    float largest = -INFINITY;
#pragma unroll
    for (std::int32_t i = 2 * h; i < 64; i += 4) largest = fmaxf(largest, fmaxf(s[i], s[i + 1]));
    largest = ptx::quad_max(largest);
    const float shift = largest == -INFINITY ? 0.0f : largest * scale_log2;
    if (is_first) {
      rows.shift[h] = shift;
    } else if (shift > rows.shift[h]) {
      rows.sum[h] *= ptx::fast_exp2(rows.shift[h] - shift);
      rows.shift[h] = shift;
    }
  }
}

template <ptx::MmaType kType, std::int32_t kHeadDim>
__device__ __forceinline__ void score_tiles(const SubMeanArgs& args, Shared& shared, std::uint32_t ring,
                                            std::int32_t num_items) {
  using Shape = SubMeanShape<kHeadDim>;
  using Mma = ptx::Wgmma<kType, kColumns>;
  const std::int32_t tile_idx = static_cast<std::int32_t>(threadIdx.x) / kTileThreads;
  const std::int32_t thread = static_cast<std::int32_t>(threadIdx.x) % kTileThreads;
  const std::int32_t lane = thread % 32;
  const std::int32_t first_row = thread / 32 * 16 + lane / 4;  // of a block; the other is 8 more
  const std::uint32_t queries = ring + static_cast<std::uint32_t>(Shape::kQueriesAt + tile_idx * Shape::kQueryBytes);
  const ptx::SmemDescriptor q_descriptor = ptx::k_major_descriptor(queries);
  const ptx::SmemDescriptor mean_descriptor = ptx::k_major_descriptor(ring);
  const std::int64_t place = std::int64_t{static_cast<std::int32_t>(blockIdx.x)} * kTiles + tile_idx;
  const std::int32_t weight_row = args.max_stages * kStagePages;
  std::uint16_t* weights = args.weights + place * kTileRows * weight_row;
  float* shifts = args.shifts + place * kTileRows * args.max_stages;
  float first[kColumns / 2] = {}, second[kColumns / 2] = {};  // scores of the two blocks

  std::int32_t count = 0;
#pragma unroll 1
  for (auto index = static_cast<std::int32_t>(blockIdx.x); index < num_items;
       index += static_cast<std::int32_t>(gridDim.x)) {
    const Item item(args, index);
    if (item.num_stages == 0) continue;
    const bool exists = tile_idx < item.pair->num_blocks;
    const QueryBlock block = item.pair->blocks[exists ? tile_idx : 0];
    const std::int32_t num_rows = exists ? block.tokens * args.group : 0;
    const std::int32_t num_stages = item.num_stages;
    const auto visible = [&](std::int32_t row) {
      return row < num_rows ? (block.first_position + row / args.group + 1) >> kGranuleLog2 : 0;
    };
    const std::int32_t common_end = exists ? (block.first_position + 1) >> kGranuleLog2 : 0;

    // A row of queries is 16 pieces of 16 bytes (D 128) in panels of 64 dimensions.
    constexpr std::int32_t kPieces = kHeadDim / 8;
#pragma unroll 4
    for (std::int32_t i = thread; i < kTileRows * kPieces; i += kTileThreads) {
      const std::int32_t row = i / kPieces, piece = i % kPieces;
      const bool valid = row < num_rows;
      const std::int32_t token = row / args.group;
      const std::int32_t head = item.kv_head * args.group + row - token * args.group;
      const std::int64_t from =
          valid ? (block.q_begin + token) * args.step.q_token_stride + head * args.step.q_head_stride : 0;
      ptx::cp_async_16(
          queries + static_cast<std::uint32_t>(piece / 8 * kPanelBytes) +
              ptx::swizzle_128b(static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(piece % 8 * 16)),
          args.step.q + from + piece * 8, valid);
    }
    ptx::cp_async_commit();
    if (thread == 0) shared.num_bad_rows[tile_idx] = 0;
    ptx::cp_async_wait<0>();
    ptx::fence_proxy_async_shared();
    ptx::named_barrier_sync(kTileDone + tile_idx, kTileThreads);

    const auto wait_stage = [&](std::int32_t u) {
      const std::int32_t c = count + u;
      ptx::mbarrier_wait(&shared.full[c % kStages], static_cast<std::uint32_t>(c / kStages & 1));
      ptx::fence_proxy_async_shared();
    };
    const auto begin_products = [&](float(&d)[kColumns / 2], std::int32_t row_block, std::int32_t u) {
      const ptx::SmemDescriptor means = mean_descriptor.advanced((count + u) % kStages * Shape::kStageBytes).uniform();
      const ptx::SmemDescriptor rows = q_descriptor.advanced(row_block * kBlockRows * ptx::kSwizzleRowBytes).uniform();
      ptx::pin_registers(d);
      ptx::wgmma_fence();
#pragma unroll
      for (std::int32_t step = 0; step < kHeadDim / 16; ++step) {
        const std::int32_t at = step / 4 * kPanelBytes + step % 4 * 32;
        Mma::template ss<false>(d, rows.advanced(at).bits(), means.advanced(at).bits(), step > 0);
      }
      ptx::wgmma_commit();
    };

    const auto free_stage = [&](std::int32_t u) {
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&shared.empty[(count + u) % kStages]);
    };

    RowState states[2] = {};
    const auto take_stage = [&](float(&d)[kColumns / 2], std::int32_t row_block, std::int32_t u) {
      RowState& rows = states[row_block];
      if ((u + 1) * kColumns > common_end) {
        const std::int32_t first_column = u * kColumns + lane % 4 * kColumns / 4;
#pragma unroll
        for (std::int32_t h = 0; h < 2; ++h) {
          const std::int32_t seen = visible(row_block * kBlockRows + first_row + 8 * h) - first_column;
#pragma unroll
          for (std::int32_t k = 0; k < kColumns / 4; ++k) {  // column k is mean k % 4 of page k / 4
            const std::int32_t i = 4 * (k / 8 * 4 + k % 4) + 2 * h + k / 4 % 2;
            if (k >= seen) d[i] = -INFINITY;
          }
        }
      }
      std::uint32_t pages[2][4];
      float sum[2];
      if (u == 0) move_shifts(rows, d, args.scale_log2, true);
      weigh(pages, sum, d, rows, args.scale_log2);
      if (__any_sync(0xffffffffu, !(sum[0] < kLargestSum) || !(sum[1] < kLargestSum))) {
        move_shifts(rows, d, args.scale_log2, false);
        weigh(pages, sum, d, rows, args.scale_log2);
      }
#pragma unroll
      for (std::int32_t h = 0; h < 2; ++h) {
        rows.sum[h] += sum[h];
        const std::int32_t row = row_block * kBlockRows + first_row + 8 * h;
        *reinterpret_cast<uint4*>(weights + row * weight_row + u * kStagePages + lane % 4 * 8) =
            uint4{pages[h][0], pages[h][1], pages[h][2], pages[h][3]};
        if (lane % 4 == 0) shifts[row * args.max_stages + u] = rows.shift[h];
      }
    };

    wait_stage(0);
    begin_products(first, 0, 0);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(first);
#pragma unroll 1
    for (std::int32_t u = 0; u < num_stages; ++u) {  // ptxas wants nothing under way from one round to the next
      begin_products(second, 1, u);
      take_stage(first, 0, u);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(second);
      free_stage(u);
      if (u + 1 < num_stages) wait_stage(u + 1);
      // Behind the last stage: products of what lies there, never read. A branch would make ptxas wait.
      begin_products(first, 0, u + 1);
      take_stage(second, 1, u);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(first);
    }
    count += num_stages;

    // A row without a finite, positive sum has a NaN or +inf score, or -inf only.
#pragma unroll
    for (std::int32_t b = 0; b < 2; ++b) {
#pragma unroll
      for (std::int32_t h = 0; h < 2; ++h) {
        const float sum = ptx::quad_sum(states[b].sum[h]);
        const std::int32_t row = b * kBlockRows + first_row + 8 * h;
        if (lane % 4 != 0) continue;
        shared.row_sums[tile_idx][row] = row < num_rows ? states[b].shift[h] + log2f(sum) : INFINITY;
        if (row < num_rows && !(sum > 0.0f && sum < INFINITY)) atomicAdd(&shared.num_bad_rows[tile_idx], 1);
      }
    }
    __threadfence_block();
    ptx::named_barrier_sync(kTileDone + tile_idx, kTileThreads);  // weights, shifts and sums are written

    const std::int64_t score_row =
        std::int64_t{item.kv_head} * args.rows.max_blocks + item.pair->first_block + tile_idx;
    float* scores = args.rows.scores + score_row * args.rows.row_stride;
    float chunk_part = 0.0f;
#pragma unroll 1
    for (std::int32_t page = 8 * thread; exists && page < num_stages * kStagePages; page += 8 * kTileThreads) {
      float sum[8] = {}, peak[8] = {};
      const std::uint16_t* from = weights + page;
      const float* shift = shifts + page / kStagePages;
#pragma unroll 1
      for (std::int32_t first_of_batch = 0; first_of_batch < num_rows; first_of_batch += kBatchRows) {
        uint4 eight[kBatchRows];  // on their way at once
        float factor[kBatchRows];
#pragma unroll
        for (std::int32_t i = 0; i < kBatchRows; ++i) {
          const std::int32_t row = first_of_batch + i;  // rows that do not exist are there, as zeros
          eight[i] = *reinterpret_cast<const uint4*>(from + row * weight_row);
          factor[i] = shift[row * args.max_stages];
        }
#pragma unroll
        for (std::int32_t i = 0; i < kBatchRows; ++i) {
          factor[i] = ptx::fast_exp2(factor[i] - shared.row_sums[tile_idx][first_of_batch + i]);
          const std::uint32_t pairs[4] = {eight[i].x, eight[i].y, eight[i].z, eight[i].w};
#pragma unroll
          for (std::int32_t k = 0; k < 4; ++k) {
            const float2 both = half_floats(pairs[k]);
            sum[2 * k] = fmaf(both.x, factor[i], sum[2 * k]);
            sum[2 * k + 1] = fmaf(both.y, factor[i], sum[2 * k + 1]);
            peak[2 * k] = fmaxf(peak[2 * k], both.x * factor[i]);
            peak[2 * k + 1] = fmaxf(peak[2 * k + 1], both.y * factor[i]);
          }
        }
      }
#pragma unroll
      for (std::int32_t i = 0; i < 8; ++i) {
        const float score = fmaf(args.peak_weight, peak[i], sum[i] / static_cast<float>(num_rows));
        if (page + i < item.past_pages) {
          scores[page + i] = score;
        } else {
          chunk_part += score;
        }
      }
    }
#pragma unroll
    for (std::int32_t offset = 16; offset > 0; offset /= 2) {
      chunk_part += __shfl_xor_sync(0xffffffffu, chunk_part, offset);
    }
    if (lane == 0) shared.chunk_parts[tile_idx][thread / 32] = chunk_part;
    ptx::named_barrier_sync(kTileDone + tile_idx, kTileThreads);
    if (thread == 0 && exists) {
      const float* parts = shared.chunk_parts[tile_idx];
      args.rows.nonfinite[score_row] = shared.num_bad_rows[tile_idx];
      args.rows.elsewhere[score_row] = parts[0] + parts[1] + (parts[2] + parts[3]);
      const std::int32_t end = (block.first_position + block.tokens) >> kGranuleLog2;
      args.rows.scored_pages[score_row] = (end + kPageGranules - 1) / kPageGranules;
    }
  }
}

template <ptx::MmaType kType, std::int32_t kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) sub_mean_sm90_kernel(const __grid_constant__ SubMeanArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = SubMeanShape<kHeadDim>;
  // The swizzle needs the stages on a multiple of 1024 bytes: the kernel has no static shared memory. Better a trap
  // than wrong numbers should that ever change.
  extern __shared__ __align__(1024) unsigned char memory[];
  if (ptx::shared_address(memory) % ptx::kSwizzleAtomBytes != 0) __trap();
  auto& shared = *reinterpret_cast<Shared*>(memory + Shape::kSharedAt);
  if (threadIdx.x == 0) {
    for (std::int32_t stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 32 * kProducerWarps);
      ptx::mbarrier_init(&shared.empty[stage], kConsumerWarps);
    }
  }
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  __syncthreads();
  const std::int32_t num_items = args.step.tables.header->num_pairs * args.num_kv_heads;
  const std::uint32_t ring = ptx::shared_address(memory);
  if (threadIdx.x >= kConsumers) {
    ptx::setmaxnreg_decrease<56>();
    gather_means<kHeadDim>(args, shared, ring, num_items);
  } else {
    ptx::setmaxnreg_increase<224>();
    score_tiles<kType, kHeadDim>(args, shared, ring, num_items);
  }
#endif
}

template <std::int32_t kHeadDim>
cudaError_t launch(const SubMeanArgs& args, DType dtype, std::int32_t ctas, bool pdl, cudaStream_t stream) {
  using Shape = SubMeanShape<kHeadDim>;
  const auto kernel = dtype == DType::kF16 ? sub_mean_sm90_kernel<ptx::MmaType::kF16, kHeadDim>
                                           : sub_mean_sm90_kernel<ptx::MmaType::kBf16, kHeadDim>;
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSmemBytes);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, ctas, kThreads, Shape::kSmemBytes, pdl, stream, args);
}

std::int32_t max_stages(const ScoreArgs& args) { return (args.max_context_tokens >> kGranuleLog2) / kColumns + 1; }

}  // namespace

std::int64_t sub_mean_sm90_scratch_bytes(const ScoreArgs& args) {
  int device = 0, major = 0;
  if (args.page_tokens != kPageTokens || (args.head_dim != 64 && args.head_dim != 128) ||
      cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess || major != 9) {
    return 0;
  }
  const std::int64_t bytes = std::int64_t{args.num_sms} * kTiles * kTileRows * max_stages(args) * (kStagePages * 2 + 4);
  return bytes <= kSubMeanSm90MaxScratch ? bytes : 0;
}

cudaError_t launch_sub_mean_sm90(const ScoreArgs& args, const ScoreRows& rows, const SubMeanOptions& options,
                                 cudaStream_t stream) {
  SubMeanArgs sub{};
  sub.step = args.step;
  sub.sub_mean_k = args.summaries.sub_mean_k;
  sub.num_kv_heads = args.num_kv_heads;
  sub.group = args.group;
  sub.max_stages = max_stages(args);
  sub.scale_log2 = args.softmax_scale * options.temperature * std::numbers::log2e_v<float>;
  sub.peak_weight = options.peak_weight;
  sub.weights = static_cast<std::uint16_t*>(args.scratch);
  sub.shifts = reinterpret_cast<float*>(sub.weights +
                                        std::int64_t{args.num_sms} * kTiles * kTileRows * sub.max_stages * kStagePages);
  sub.rows = rows;
  return args.head_dim == 64 ? launch<64>(sub, args.kv.dtype, args.num_sms, args.pdl, stream)
                             : launch<128>(sub, args.kv.dtype, args.num_sms, args.pdl, stream);
}

}  // namespace compact
