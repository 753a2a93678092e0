// The mean-key rule of selector.h (packed tiles, visible kFull, row norm, vote max), one kernel from Q and means to
// mask words, for sm_90a: wgmma. A CTA owns two tiles (mean_key_tile.cuh) of neighbouring query blocks, so that a mean
// that is fetched serves 256 rows; head dimension 256 and steps with fewer tiles than SMs: one. Budget and figures:
// docs/design/step-kernels.md.
//
//   producers  4 warps gather stages of 64 means through the page table by cp.async, 16 each, into the layout of wgmma
//   consumers  2 warpgroups of 64 rows per tile: S = Q M^T with Q in registers, a stage at a time. Their halves take
//              exponentials in turns: while one does, the other waits for products and marks pages
//   pass 1     all pages: sums of the rows in base 2, against a reference that is moved only when a sum grows large.
//              A page with a score above its row's running cut is marked
//   pass 2     the marked pages alone, packed 64 to a stage: the same scores, compared with the final cut. Their means
//   are
//              fetched while the first pass still runs
//   barriers   full[stage] and empty[stage]; one of all consumers between the passes
//
// The vote is an OR of rows, so warps meet only in mask words, by integer atomics: same input, same bits.
#include <cmath>
#include <cstdint>

#include "src/core/launch_kernel.h"
#include "src/ptx/control.cuh"
#include "src/ptx/cp_async.cuh"
#include "src/ptx/log2.cuh"
#include "src/ptx/mbarrier.cuh"
#include "src/ptx/quad.cuh"
#include "src/ptx/shared_address.cuh"
#include "src/ptx/smem_descriptor.cuh"
#include "src/ptx/wgmma.cuh"
#include "src/select/cuda/mean_key_tile.cuh"

namespace compact {
namespace {

constexpr std::int32_t kPages = kMeanKeyPages;
constexpr std::int32_t kMaxTiles = 2;  // of a CTA
constexpr std::int32_t kTileWarps = kMeanKeyRows / 16;
constexpr std::int32_t kProducerWarps = 4;
constexpr std::int32_t kProducerPages = kPages / kProducerWarps;  // of a stage
constexpr std::int32_t kMaxStages = 8;
constexpr std::int32_t kPanelBytes = kPages * ptx::kSwizzleRowBytes;
constexpr float kLargestSum = 4294967296.0f;  // 2^32: then the reference moves

enum NamedBarrier { kWordsDone = 1, kFirstTurn = 2 };  // a turn for each half of the consumers

struct Shared {
  MeanKeyTile tiles[kMaxTiles];     // the second has no rows if the CTA has one block
  std::uint64_t full[kMaxStages];   // arrivals: threads of the producers whose copies have landed, and their warps
  std::uint64_t empty[kMaxStages];  // arrivals: consumer warps
  std::int32_t num_bad_rows[kMaxTiles];
  std::int32_t marked_pages[kProducerWarps][2 * kPages];  // ring of each producer
  std::int32_t stage_pages[kMaxStages * kPages];          // logical page of each column, -1: none
};

template <std::int32_t kHeadDim, std::int32_t kTiles>
struct Sm90Shape {
  static constexpr std::int32_t kConsumerWarps = kTiles * kTileWarps;
  static constexpr std::int32_t kConsumers = 32 * kConsumerWarps;
  static constexpr std::int32_t kThreads = kConsumers + 32 * kProducerWarps;
  static constexpr std::int32_t kStages = kHeadDim == 256 ? 4 : kMaxStages;
  static constexpr std::int32_t kStageBytes = kPages * kHeadDim * 2;
  static constexpr std::int32_t kSharedAt = kStages * kStageBytes;
  static constexpr std::int32_t kWordsAt = kSharedAt + static_cast<std::int32_t>(sizeof(Shared));

  // After the stages: marked pages, the wanted pages of each tile, and for every word of marked pages a barrier that
  // waits for all consumer warps to be past its stage.
  static constexpr std::int32_t smem_bytes(std::int32_t words_per_row) {
    return kWordsAt + (2 + kTiles) * words_per_row * 8;
  }
};
static_assert(sizeof(Shared) % 8 == 0, "words follow");

// Pages in order. `next`: the logical page of column `column` in the next stage, -1: none; false: there is no stage.
// All lanes of a warp together.
struct AllPages {
  std::int32_t first, end;

  __device__ __forceinline__ bool next(std::int32_t column, std::int32_t, std::int32_t& page) {
    const std::int32_t j = first + column;
    page = j < end ? j : -1;
    first += kPages;
    return first - kPages < end;
  }
};

// The marked ones, in order, while the first pass still marks: a word is read once every consumer warp is past its
// stage, and unpacked into a ring until there is a stage. Every producer does it for itself.
struct MarkedPages {
  const std::uint64_t* words;
  std::uint64_t* past;  // barrier of each word
  std::int32_t* ring;   // [2 * kPages]
  std::int32_t past_pages;
  std::int32_t num_words;
  std::int32_t next_word = 0, num_found = 0, num_taken = 0;

  __device__ __forceinline__ bool next(std::int32_t column, std::int32_t lane, std::int32_t& page) {
    while (num_found < num_taken + kPages && next_word < num_words) {
      ptx::mbarrier_wait(&past[next_word], 0);
      const std::uint64_t word = words[next_word] & bits_in_word(0, past_pages, next_word);
#pragma unroll
      for (std::int32_t bit = lane; bit < 64; bit += 32) {
        if ((word >> bit & 1) == 0) continue;
        const std::int32_t at = num_found + count_bits(word & ((std::uint64_t{1} << bit) - 1));
        ring[at % (2 * kPages)] = next_word * 64 + bit;
      }
      num_found += count_bits(word);
      ++next_word;
    }
    __syncwarp();
    const std::int32_t at = num_taken + column;
    page = at < num_found ? ring[at % (2 * kPages)] : -1;
    __syncwarp();
    num_taken += kPages;
    return num_taken - kPages < num_found;
  }
};

// A pass of a producer warp: its columns of each stage. `count`: stages of the kernel so far. The ids of kBatch stages
// are on their way at once.
template <std::int32_t kHeadDim, std::int32_t kTiles, std::int32_t kBatch, class Pages>
__device__ __forceinline__ void gather_means(const MeanKeyArgs& args, Shared& shared, std::uint32_t ring, Pages pages,
                                             std::int32_t warp, std::int32_t& count) {
  using Shape = Sm90Shape<kHeadDim, kTiles>;
  constexpr std::int32_t kPieces = kHeadDim / 8;       // of 16 bytes
  constexpr std::int32_t kRowsPerCopy = 32 / kPieces;  // pages that the warp copies at once
  constexpr std::int32_t kCopies = kProducerPages / kRowsPerCopy;
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x) % 32;
  const std::int32_t piece = lane % kPieces;
  const std::int32_t lane_row = lane / kPieces;
  const std::int32_t column = warp * kProducerPages + lane % kProducerPages;  // whose page this lane finds
  const MeanKeyTile& tile = shared.tiles[0];
  const std::int32_t* table = tile.table;
  const std::int32_t page_elements = args.num_kv_heads * kHeadDim;
  const std::uint16_t* means = args.mean_k + tile.kv_head * kHeadDim + piece * 8;
  const std::uint32_t lane_offset = static_cast<std::uint32_t>(piece / 8 * kPanelBytes) +
                                    ptx::swizzle_128b(static_cast<std::uint32_t>(warp * kProducerPages + lane_row),
                                                      static_cast<std::uint32_t>(piece % 8 * 16));
  bool exists = true;
#pragma unroll 1
  while (exists) {
    std::int32_t logical[kBatch], ids[kBatch], num_stages = 0;
#pragma unroll
    for (std::int32_t b = 0; b < kBatch; ++b) {
      exists = exists && pages.next(column, lane, logical[b]);
      if (!exists) break;
      ++num_stages;
      ids[b] = logical[b] >= 0 ? table[logical[b]] : -1;
    }
#pragma unroll
    for (std::int32_t b = 0; b < kBatch; ++b) {
      if (b >= num_stages) break;
      // Of the chunk's own pages some have no mean; in the second pass there are none.
      if (logical[b] >= tile.past_pages && !page_has_mean(args, tile, logical[b], ids[b])) logical[b] = ids[b] = -1;
      // All ids first: a copy that waits for a shuffle keeps the next shuffle waiting.
      std::int32_t page[kCopies];  // this lane's: row i * kRowsPerCopy + lane_row
#pragma unroll
      for (std::int32_t i = 0; i < kCopies; ++i) {
        page[i] = __shfl_sync(0xffffffffu, ids[b], i * kRowsPerCopy + lane_row);
      }
      const std::int32_t stage = count % Shape::kStages;
      ptx::mbarrier_wait(&shared.empty[stage], static_cast<std::uint32_t>(count / Shape::kStages & 1) ^ 1);
      ++count;
      if (lane < kProducerPages) shared.stage_pages[stage * kPages + column] = logical[b];
      const std::uint32_t to = ring + static_cast<std::uint32_t>(stage * Shape::kStageBytes) + lane_offset;
#pragma unroll
      for (std::int32_t i = 0; i < kCopies; ++i) {
        const std::int32_t row = i * kRowsPerCopy;
        const bool valid = page[i] >= 0;
        ptx::cp_async_16(
            (to ^ static_cast<std::uint32_t>((row & 7) << 4)) + static_cast<std::uint32_t>(row * ptx::kSwizzleRowBytes),
            means + (valid ? std::int64_t{page[i]} * page_elements : 0), valid);
      }
      ptx::cp_async_arrive(&shared.full[stage]);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&shared.full[stage]);  // the logical pages are written
    }
  }
}

// 16 rows of the tile from `first_row` on as fragments of operand A, straight from memory: each value is needed by one
// thread, once. Rows that do not exist are zeros.
template <std::int32_t kHeadDim>
__device__ __forceinline__ void load_queries(std::uint32_t (&q)[kHeadDim / 4], const MeanKeyArgs& args,
                                             const MeanKeyTile& tile, std::int32_t first_row, std::int32_t lane) {
#pragma unroll
  for (std::int32_t h = 0; h < 2; ++h) {
    const std::int32_t row = first_row + lane / 4 + 8 * h;
    const std::int32_t token = row / args.group;
    const std::int32_t head = tile.kv_head * args.group + row - token * args.group;
    const std::uint16_t* from =
        args.q + (tile.q_begin + token) * args.q_token_stride + head * args.q_head_stride + lane % 4 * 2;
#pragma unroll
    for (std::int32_t i = 0; i < kHeadDim / 8; ++i) {
      q[4 * (i / 2) + 2 * (i % 2) + h] = row < tile.rows ? *reinterpret_cast<const std::uint32_t*>(from + 8 * i) : 0u;
    }
  }
}

// Two rows of a thread: first_row + lane / 4 and 8 more.
struct RowSums {
  float reference[2] = {-INFINITY, -INFINITY};  // a score, the same in a quad
  float shift[2] = {0, 0};                      // scaled; 0 while there is no reference
  float sum[2] = {INFINITY, INFINITY};          // of 2^(scaled score - shift), of this thread's columns; +inf while
                                                // there is no reference
};

__device__ __forceinline__ void sum_stage(float (&sum)[2], const RowSums& rows, const float (&s)[kPages / 2],
                                          float scale_log2) {
#pragma unroll
  for (std::int32_t h = 0; h < 2; ++h) {
    float even = rows.sum[h], odd = 0.0f;
#pragma unroll
    for (std::int32_t i = 2 * h; i < kPages / 2; i += 4) {
      even += ptx::fast_exp2(fmaf(s[i], scale_log2, -rows.shift[h]));
      odd += ptx::fast_exp2(fmaf(s[i + 1], scale_log2, -rows.shift[h]));
    }
    sum[h] = even + odd;
  }
}

// Moves the references of the warp's rows up to the largest score of this stage: the first one's, and when a sum has
// grown large. NaN sums stay, +inf gives NaN, a row of -inf keeps no reference.
__device__ __forceinline__ void move_references(RowSums& rows, const float (&s)[kPages / 2], float scale_log2) {
#pragma unroll
  for (std::int32_t h = 0; h < 2; ++h) {
    float largest = -INFINITY;
#pragma unroll
    for (std::int32_t i = 2 * h; i < kPages / 2; i += 4) largest = fmaxf(largest, fmaxf(s[i], s[i + 1]));
    largest = ptx::quad_max(largest);
    if (!(largest > rows.reference[h])) continue;
    const float shift = largest * scale_log2;
    rows.sum[h] = rows.reference[h] == -INFINITY ? 0.0f : rows.sum[h] * ptx::fast_exp2(rows.shift[h] - shift);
    rows.reference[h] = largest;
    rows.shift[h] = shift;
  }
}

// Columns of a stage in which a row of the warp reaches its cut; the same in all lanes.
struct Hits {
  std::uint32_t low, high;
};
__device__ __forceinline__ Hits find_hits(const float (&s)[kPages / 2], const float (&cut)[2], std::int32_t lane) {
  std::uint32_t bits[2] = {0, 0};
#pragma unroll
  for (std::int32_t k = 0; k < kPages / 4; ++k) {  // column 8 (k / 2) + k % 2, and 2 more for each lane of the quad
    const float first = s[4 * (k / 2) + k % 2], second = s[4 * (k / 2) + 2 + k % 2];
    if (first >= cut[0] || second >= cut[1]) bits[k / 8] |= 1u << (k / 2 % 4 * 8 + k % 2);
  }
  const std::int32_t to_quad = lane % 4 * 2;
  return {__reduce_or_sync(0xffffffffu, bits[0] << to_quad), __reduce_or_sync(0xffffffffu, bits[1] << to_quad)};
}

// Stages of the second pass; all lanes of a warp together.
__device__ __forceinline__ std::int32_t num_marked_stages(const unsigned* marked, std::int32_t words_per_row,
                                                          std::int32_t past_pages, std::int32_t lane) {
  const auto* words = reinterpret_cast<const std::uint64_t*>(marked);
  unsigned pages = 0;
  for (std::int32_t w = lane; w < words_per_row; w += 32) {
    pages += static_cast<unsigned>(count_bits(words[w] & bits_in_word(0, past_pages, w)));
  }
  return static_cast<std::int32_t>((__reduce_add_sync(0xffffffffu, pages) + kPages - 1) / kPages);
}

// A consumer warp: both passes, and the mask words of its tile.
template <ptx::MmaType kType, std::int32_t kHeadDim, std::int32_t kTiles>
__device__ __forceinline__ void select_pages(const MeanKeyArgs& args, Shared& shared, unsigned char* memory,
                                             std::int32_t num_stages) {
  using Shape = Sm90Shape<kHeadDim, kTiles>;
  using Mma = ptx::Wgmma<kType, kPages>;
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  const std::int32_t lane = thread % 32;
  const std::int32_t tile_idx = thread / (32 * kTileWarps), tile_warp = thread / 32 % kTileWarps;
  const MeanKeyTile& tile = shared.tiles[tile_idx];
  const std::int32_t past_pages = tile.past_pages;
  auto* marked = reinterpret_cast<unsigned*>(memory + Shape::kWordsAt);  // [2 * words_per_row]
  unsigned* wanted = marked + (1 + tile_idx) * 2 * args.words_per_row;
  std::uint64_t* past = reinterpret_cast<std::uint64_t*>(marked) + (1 + kTiles) * args.words_per_row;

  std::uint32_t q[kHeadDim / 4];
  load_queries<kHeadDim>(q, args, tile, 16 * tile_warp, lane);
  const ptx::SmemDescriptor means = ptx::k_major_descriptor(ptx::shared_address(memory));
  const bool row_exists[2] = {16 * tile_warp + lane / 4 < tile.rows, 16 * tile_warp + lane / 4 + 8 < tile.rows};

  // All queries are here before the first product: without this barrier the step takes a fifth longer (156 us for 133
  // at B8 L128K).
  ptx::named_barrier_sync(kWordsDone, Shape::kConsumers);

  // Scores of the kernel's stage number `count`: products without the scale. The stage stays taken.
  float s[kPages / 2];
  const auto score_stage = [&](std::int32_t count) {
    const std::int32_t stage = count % Shape::kStages;
    ptx::mbarrier_wait(&shared.full[stage], static_cast<std::uint32_t>(count / Shape::kStages & 1));
    ptx::fence_proxy_async_shared();
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
  };
  const auto free_stage = [&](std::int32_t count) {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&shared.empty[count % Shape::kStages]);
  };

  // Without turns all warps come to want exponentials at the same time, and then products at the same time. One half of
  // them has as many as the exponential units take.
  const bool is_last = thread >= Shape::kConsumers / 2;
  const std::int32_t own_turn = is_last ? kFirstTurn + 1 : kFirstTurn, next_turn = 2 * kFirstTurn + 1 - own_turn;
  if (is_last) ptx::named_barrier_arrive(next_turn, Shape::kConsumers);

  std::int32_t num_scored = tile.end;
  RowSums rows;
  float cut[2];
#pragma unroll 1
  for (std::int32_t u = 0; u < num_stages; ++u) {
    score_stage(u);
    std::uint64_t scored = ~std::uint64_t{0};
    const bool has_own_pages = (u + 1) * kPages > past_pages;  // pages of the chunk, or none
    if (has_own_pages) {
      const std::int32_t* pages = &shared.stage_pages[u % Shape::kStages * kPages];
      const auto is_scored = [&](std::int32_t page) { return page >= 0 && page < tile.end; };
      const std::uint32_t low = __ballot_sync(0xffffffffu, is_scored(pages[lane]));
      const std::uint32_t high = __ballot_sync(0xffffffffu, is_scored(pages[32 + lane]));
      scored = std::uint64_t{high} << 32 | low;
    }
    free_stage(u);
    if (has_own_pages) {
      num_scored -= num_unscored(tile, u * kPages, scored);
      const std::uint64_t of_lane = scored >> (lane % 4 * 2);
#pragma unroll
      for (std::int32_t i = 0; i < kPages / 2; ++i) {
        if ((of_lane >> (i / 4 * 8 + i % 2) & 1) == 0) s[i] = -INFINITY;
      }
    }
    float sum[2];
    ptx::named_barrier_sync(own_turn, Shape::kConsumers);
    ptx::pin_registers(s);
    sum_stage(sum, rows, s, args.scale_log2);
    ptx::pin_registers(sum);
    if (!is_last || u + 1 < num_stages) ptx::named_barrier_arrive(next_turn, Shape::kConsumers);
    if (__any_sync(0xffffffffu, !(sum[0] < kLargestSum) || !(sum[1] < kLargestSum))) {
      move_references(rows, s, args.scale_log2);
      sum_stage(sum, rows, s, args.scale_log2);
    }
#pragma unroll
    for (std::int32_t h = 0; h < 2; ++h) {
      rows.sum[h] = sum[h];
      const float running =
          fmaf(ptx::fast_log2(ptx::quad_sum(sum[h])) + tile.candidate_margin, args.inverse_scale, rows.reference[h]);
      cut[h] = row_exists[h] ? running : INFINITY;
    }
    const Hits hits = find_hits(s, cut, lane);
    if (lane == 0) {
      if (hits.low != 0) atomicOr(&marked[2 * u], hits.low);
      if (hits.high != 0) atomicOr(&marked[2 * u + 1], hits.high);
      ptx::mbarrier_arrive(&past[u]);
    }
  }

  // Final cuts. A row without a finite, positive sum has a NaN or +inf score, or -inf only.
  const float threshold = tile.threshold(args, num_scored);
#pragma unroll
  for (std::int32_t h = 0; h < 2; ++h) {
    const float sum = ptx::quad_sum(rows.sum[h]);
    const float last = fmaf(log2f(sum) + log2f(threshold), args.inverse_scale, rows.reference[h]);
    cut[h] = row_exists[h] ? last : INFINITY;
    if (lane % 4 == 0 && row_exists[h] && !(sum > 0.0f && sum < INFINITY)) {
      atomicAdd(&shared.num_bad_rows[tile_idx], 1);
    }
  }
  ptx::named_barrier_sync(kWordsDone, Shape::kConsumers);  // all pages are marked
  const std::int32_t num_second = num_marked_stages(marked, args.words_per_row, past_pages, lane);
#pragma unroll 1
  for (std::int32_t v = 0; v < num_second; ++v) {
    score_stage(num_stages + v);
    const std::int32_t* pages = &shared.stage_pages[(num_stages + v) % Shape::kStages * kPages];
    const std::int32_t low_page = pages[lane], high_page = pages[32 + lane];
    free_stage(num_stages + v);
    const Hits hits = find_hits(s, cut, lane);
    const auto want = [&](std::int32_t page, std::uint32_t of_columns) {
      if ((of_columns >> lane & 1) != 0 && page >= 0) atomicOr(&wanted[page / 32], 1u << page % 32);
    };
    want(low_page, hits.low);
    want(high_page, hits.high);
  }
  ptx::named_barrier_sync(kWordsDone, Shape::kConsumers);
  const std::int32_t num_bad_rows = shared.num_bad_rows[tile_idx];
  const std::int32_t tile_thread = thread % (32 * kTileWarps);
  if (tile.rows == 0) return;
  for (std::int32_t w = tile_thread; w < args.words_per_row; w += 32 * kTileWarps) {
    tile.mask_row[w] =
        num_bad_rows > 0 ? bits_in_word(0, past_pages, w) : std::uint64_t{wanted[2 * w + 1]} << 32 | wanted[2 * w];
  }
  if (tile_thread == 0 && num_bad_rows > 0 && args.nonfinite_rows != nullptr) {
    atomicAdd(args.nonfinite_rows, static_cast<unsigned long long>(num_bad_rows));
  }
}

template <ptx::MmaType kType, std::int32_t kHeadDim, std::int32_t kTiles>
__global__ void __launch_bounds__(Sm90Shape<kHeadDim, kTiles>::kThreads, 1)
    mean_key_sm90_kernel(const __grid_constant__ MeanKeyArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = Sm90Shape<kHeadDim, kTiles>;
  // The swizzle needs the stages on a multiple of 1024 bytes: the kernel has no static shared memory. Better a trap
  // than wrong numbers should that ever change.
  extern __shared__ __align__(1024) unsigned char memory[];
  if (ptx::shared_address(memory) % ptx::kSwizzleAtomBytes != 0) __trap();
  auto& shared = *reinterpret_cast<Shared*>(memory + Shape::kSharedAt);
  if (threadIdx.x == 0) {
    for (std::int32_t stage = 0; stage < Shape::kStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 33 * kProducerWarps);
      ptx::mbarrier_init(&shared.empty[stage], Shape::kConsumerWarps);
    }
    for (std::int32_t tile = 0; tile < kTiles; ++tile) shared.num_bad_rows[tile] = 0;
  }
  auto* words = reinterpret_cast<std::uint64_t*>(memory + Shape::kWordsAt);  // marked, wanted
  std::uint64_t* past = words + (1 + kTiles) * args.words_per_row;
  for (auto w = static_cast<std::int32_t>(threadIdx.x); w < args.words_per_row; w += Shape::kThreads) {
    for (std::int32_t i = 0; i <= kTiles; ++i) words[i * args.words_per_row + w] = 0;
    ptx::mbarrier_init(&past[w], Shape::kConsumerWarps);
  }
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  // KV heads of a block, or a pair of blocks, side by side.
  const auto place = static_cast<std::int32_t>(blockIdx.x) / args.num_kv_heads;
  const std::int32_t kv_head = static_cast<std::int32_t>(blockIdx.x) - place * args.num_kv_heads;
  const bool finds_tile = threadIdx.x % 32 == 0 && threadIdx.x / 32 < kTiles;
  if constexpr (kTiles == 2) {
    if (finds_tile) {  // before the header is here: places that do not exist can be read
      const auto i = static_cast<std::int32_t>(threadIdx.x) / 32;
      const BlockPair pair = args.tables.pairs[place];
      MeanKeyTile tile{};
      if (place < args.tables.header->num_pairs && pair.num_blocks > 0) {
        const std::int32_t k = min(i, pair.num_blocks - 1);
        tile = make_tile(args, pair.blocks[k], pair.chunk, pair.first_block + k, kv_head);
        if (k < i) tile.rows = 0;
      }
      shared.tiles[i] = tile;
    }
  } else {
    if (place >= args.tables.header->num_blocks) return;
    if (finds_tile) shared.tiles[0] = find_tile(args, place, kv_head);
  }
  __syncthreads();
  const MeanKeyTile& first = shared.tiles[0];
  const MeanKeyTile& last = shared.tiles[kTiles - 1];
  if (first.rows == 0) return;
  if (first.share <= 0 || first.past_pages == 0) {  // nothing to compare: all past pages, of which there may be none
    for (auto w = static_cast<std::int32_t>(threadIdx.x); w < args.words_per_row; w += Shape::kThreads) {
      const std::uint64_t past = bits_in_word(0, first.past_pages, w);
      first.mask_row[w] = past;
      if (last.rows > 0) last.mask_row[w] = past;
    }
    return;
  }
  const std::int32_t num_stages = last.num_stages();  // of the longer one
  if (threadIdx.x < Shape::kConsumers) {
    select_pages<kType, kHeadDim, kTiles>(args, shared, memory, num_stages);
    return;
  }
  const std::uint32_t ring = ptx::shared_address(memory);
  const std::int32_t warp = static_cast<std::int32_t>(threadIdx.x) / 32 - Shape::kConsumerWarps;
  std::int32_t count = 0;
  gather_means<kHeadDim, kTiles, 4>(args, shared, ring, AllPages{0, last.end}, warp, count);
  // Words behind the last stage stay empty: there are none of past pages.
  const MarkedPages pages{words, past, shared.marked_pages[warp], first.past_pages,
                          (first.past_pages + kPages - 1) / kPages};
  gather_means<kHeadDim, kTiles, 1>(args, shared, ring, pages, warp, count);
#endif
}

template <std::int32_t kHeadDim, std::int32_t kTiles>
cudaError_t launch(const MeanKeyArgs& args, cudaStream_t stream) {
  using Shape = Sm90Shape<kHeadDim, kTiles>;
  const auto kernel = args.dtype == DType::kF16 ? mean_key_sm90_kernel<ptx::MmaType::kF16, kHeadDim, kTiles>
                                                : mean_key_sm90_kernel<ptx::MmaType::kBf16, kHeadDim, kTiles>;
  const std::int32_t smem_bytes = Shape::smem_bytes(args.words_per_row);
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  if (error != cudaSuccess) return error;
  const std::int32_t places = kTiles == 2 ? args.max_pairs : args.max_blocks;
  return launch_kernel(kernel, places * args.num_kv_heads, Shape::kThreads, smem_bytes, true, stream, args);
}

template <std::int32_t kHeadDim>
cudaError_t launch_by_size(const MeanKeyArgs& args, std::int32_t num_sms, cudaStream_t stream) {
  if (args.max_blocks * args.num_kv_heads <= num_sms) return launch<kHeadDim, 1>(args, stream);
  return launch<kHeadDim, 2>(args, stream);
}

}  // namespace

cudaError_t launch_mean_key_sm90(const MeanKeyArgs& args, cudaStream_t stream) {
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  switch (args.head_dim) {
    case 64: return launch_by_size<64>(args, num_sms, stream);
    case 128: return launch_by_size<128>(args, num_sms, stream);
    case 256: return launch<256, 1>(args, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace compact
