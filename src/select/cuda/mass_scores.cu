// Scores of `sub-mean`, `mean-key` and `oracle`: what a page's columns get of each row's softmax over all columns that
// it sees, joined over the rows of a tile. One kernel: columns are means of granules or pages, or keys, a tile is
// packed (tokens x the G heads of a KV head) or one query head's. For every device from sm_80 on: cp.async and
// mma.sync.
//
//   warps   4 of 32 rows (head dimension 256: 8 of 16): a fragment of columns read from shared memory serves 2 MMAs
//   Q       fragments in registers, loaded once through stages 1 and 2 of the ring
//   ring    3 stages of 64 columns, gathered through the page table by cp.async (score_columns.cuh)
//   pass 1  maximum and sum of each row in base 2, as in flash attention
//   pass 2  the same products again: 2^(score - log-sum-exp), summed over the columns of a page, then over the rows of
//           the warp; warps meet in shared memory, in order. Nothing is stored but the scores
//
// A pass more costs less than keeping 128 rows x pages, which do not fit an SM; nor does it need scratch. Sums have a
// fixed order: same input, same bits.
#include <cmath>
#include <cstdint>
#include <numbers>

#include "src/core/count_bits.h"
#include "src/core/launch_kernel.h"
#include "src/ptx/control.cuh"
#include "src/ptx/quad.cuh"
#include "src/ptx/shared_address.cuh"
#include "src/select/cuda/score_columns.cuh"
#include "src/select/cuda/scores.h"
#include "src/select/cuda/sub_mean_sm90.h"

namespace compact {
namespace {

constexpr std::int32_t kRows = 128;
constexpr std::int32_t kStages = 3;

struct MassArgs {
  StepQueries step;
  ScoreColumns columns;
  std::int32_t column_tokens_log2;  // a row at position p sees the columns [0, (p + 1) >> this)
  bool one_view = false;            // p + 1 is the block's first position for all its rows
  std::int32_t page_tokens;
  std::int32_t group;       // G
  std::int32_t tile_heads;  // query heads of a tile: G or 1
  float scale_log2;         // factor of a product, times log2(e)
  float mean_weight = 1;    // of the mean over rows
  float peak_weight;        // of the maximum; above 0: pages of up to 16 columns only
  ScoreRows rows;
};

// A tile's place in the step, in shared memory: registers are full.
struct MassTile {
  const std::int32_t* table;  // [Kb]
  std::int64_t score_row;
  std::int32_t q_begin;
  std::int32_t first_view;  // row r sees the columns [0, (this + r / view_rows) >> column_tokens_log2)
  std::int32_t view_rows;
  std::int32_t q_head, kv_head;
  std::int32_t rows;        // tokens x tile_heads
  std::int32_t past_pages;  // Np
  std::int32_t end;         // columns that some row sees
  std::int32_t common_end;  // columns that every row sees
};

template <std::int32_t kHeadDim>
struct MassShape {
  static constexpr std::int32_t kRowBlocks = kHeadDim == 256 ? 1 : 2;  // m16 blocks of a warp
  static constexpr std::int32_t kWarps = kRows / 16 / kRowBlocks;
  static constexpr std::int32_t kThreads = 32 * kWarps;
  static constexpr std::int32_t kStageBytes = kStageColumns * kHeadDim * 2;
  static constexpr std::int32_t kSmemBytes = kStages * kStageBytes;
  static constexpr std::int32_t kCtasPerSm = kHeadDim == 256 ? 1 : 3;
};

// Of the pages of two stages, from each warp.
template <std::int32_t kWarps>
struct MassParts {
  float sum[2][kWarps][kStageColumns];
  float peak[2][kWarps][kStageColumns];
};

// Pages of up to 16 columns: sums over the pages of a thread's rows, then over the warp's. kPages: of a thread.
template <std::int32_t kPages, std::int32_t kRowBlocks>
__device__ __forceinline__ void join_pages(const float (&p)[kRowBlocks][kStageColumns / 2], std::int32_t lane,
                                           float* sums, float* peaks) {
  constexpr std::int32_t kColumns = kLaneColumns / kPages;
  float sum[kPages], peak[kPages];
#pragma unroll
  for (std::int32_t page = 0; page < kPages; ++page) {
    sum[page] = peak[page] = 0.0f;
#pragma unroll
    for (std::int32_t b = 0; b < kRowBlocks; ++b) {
#pragma unroll
      for (std::int32_t h = 0; h < 2; ++h) {
        float of_row = 0.0f;
#pragma unroll
        for (std::int32_t k = 0; k < kColumns; ++k) of_row += p[b][fragment_index(page * kColumns + k, h)];
        sum[page] += of_row;
        peak[page] = fmaxf(peak[page], of_row);
      }
    }
  }
  join_lanes(sum, lane, [](float a, float b) { return a + b; });
  join_lanes(peak, lane, [](float a, float b) { return fmaxf(a, b); });
  constexpr std::int32_t kLeft = kPages > 8 ? kPages / 8 : 1;
  const std::int32_t first = lane % 4 * kPages + joined_first<kPages>(lane);
#pragma unroll
  for (std::int32_t i = 0; i < kLeft; ++i) {  // below 8 pages some lanes hold, and write, the same
    sums[first + i] = sum[i];
    peaks[first + i] = peak[i];
  }
}

template <ptx::MmaType kType, std::int32_t kHeadDim>
__global__ void __launch_bounds__(MassShape<kHeadDim>::kThreads, MassShape<kHeadDim>::kCtasPerSm)
    mass_scores_kernel(const __grid_constant__ MassArgs args) {
  using Shape = MassShape<kHeadDim>;
  constexpr std::int32_t kRowBlocks = Shape::kRowBlocks;
  constexpr std::int32_t kSteps = kHeadDim / 16;

  // Aligned to more than a row, so that fragment loops may flip address bits within one.
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  __shared__ MassTile tile;
  __shared__ MassParts<Shape::kWarps> parts;
  __shared__ float chunk_parts[kStageColumns];
  __shared__ std::int32_t num_bad_rows;
  const std::uint32_t ring = ptx::shared_address(shared_memory);

  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const std::int32_t block_idx = static_cast<std::int32_t>(blockIdx.x) / args.rows.mask_heads;
  if (block_idx >= args.step.tables.header->num_blocks) return;
  if (threadIdx.x == 0) {
    const std::int32_t head = static_cast<std::int32_t>(blockIdx.x) - block_idx * args.rows.mask_heads;
    const QueryBlock block = args.step.tables.blocks[block_idx];
    const StepChunk chunk = args.step.tables.chunks[block.chunk];
    tile.table = args.step.page_tables + chunk.table_row * args.step.page_table_stride;
    tile.score_row = std::int64_t{head} * args.rows.max_blocks + block_idx;
    tile.q_begin = block.q_begin;
    tile.first_view = block.first_position + (args.one_view ? 0 : 1);
    tile.view_rows = args.one_view ? kRows : args.tile_heads;
    tile.q_head = head * args.tile_heads;
    tile.kv_head = tile.q_head / args.group;
    tile.past_pages = chunk.chunk_start / args.page_tokens;
    tile.rows = chunk.is_short != 0 || tile.past_pages == 0 ? 0 : block.tokens * args.tile_heads;
    tile.end = (block.first_position + (args.one_view ? 0 : block.tokens)) >> args.column_tokens_log2;
    tile.common_end = tile.first_view >> args.column_tokens_log2;
    num_bad_rows = 0;
  }
  __syncthreads();
  if (tile.rows == 0) return;

  auto thread = static_cast<std::int32_t>(threadIdx.x);
  const auto lane = [&] { return thread % 32; };
  const auto warp = [&] { return thread / 32; };
  const auto row_of = [&](std::int32_t b, std::int32_t h) {
    return thread / 32 * kRowBlocks * 16 + 16 * b + 8 * h + lane() / 4;
  };
  const auto load = [&](std::int32_t stage) {
    load_columns<kHeadDim, Shape::kThreads>(ring + static_cast<std::uint32_t>(stage % kStages * Shape::kStageBytes),
                                            args.columns, tile.table, tile.kv_head, stage * kStageColumns, tile.end);
  };
  load_packed_queries<kHeadDim, kRows, Shape::kThreads>(ring + Shape::kStageBytes, args.step.q,
                                                        args.step.q_token_stride, args.step.q_head_stride, tile.q_begin,
                                                        tile.q_head, args.tile_heads, tile.rows);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  std::uint32_t q[kRowBlocks][kSteps][4];
  load_fragments<kHeadDim, kRowBlocks>(q, ring + Shape::kStageBytes, warp() * kRowBlocks * 16, lane());
  __syncthreads();  // stages 1 and 2 are free

  // Scores are products without the scale. Row (b, h) of this thread is row_of(b, h).
  float row_max[kRowBlocks][2], row_sum[kRowBlocks][2];  // the sum of this thread's columns
#pragma unroll
  for (std::int32_t b = 0; b < kRowBlocks; ++b) {
    row_max[b][0] = row_max[b][1] = -INFINITY;
    row_sum[b][0] = row_sum[b][1] = 0.0f;
  }
  const std::int32_t num_stages = (tile.end + kStageColumns - 1) / kStageColumns;
  const std::int32_t page_log2 = args.columns.page_columns_log2;
  float long_page = 0.0f;   // of a page of more than 64 columns, so far
  float chunk_part = 0.0f;  // scores of the chunk's pages that this thread has joined

  // The pages that end with this stage: warps in order. One thread for each page.
  const auto join_stage = [&](std::int32_t u) {
    const std::int32_t first_column = u * kStageColumns;
    const std::int32_t pages = page_log2 >= 6 ? 1 : kStageColumns >> page_log2;
    const std::int32_t i = static_cast<std::int32_t>(threadIdx.x);
    const bool page_goes_on = ((first_column + kStageColumns) & ((1 << page_log2) - 1)) != 0 && u + 1 < num_stages;
    if (i >= pages || page_goes_on) return;
    float sum = 0.0f, peak = 0.0f;
#pragma unroll
    for (std::int32_t w = 0; w < Shape::kWarps; ++w) {
      sum += parts.sum[u % 2][w][i];
      peak = fmaxf(peak, parts.peak[u % 2][w][i]);
    }
    const float score = fmaf(args.peak_weight, peak, args.mean_weight * (sum / static_cast<float>(tile.rows)));
    const std::int32_t page = (first_column >> page_log2) + i;
    if (page < tile.past_pages) {
      args.rows.scores[tile.score_row * args.rows.row_stride + page] = score;
    } else {
      chunk_part += score;
    }
  };

#pragma unroll 1
  for (std::int32_t pass = 0; pass < 2; ++pass) {
    load(0);
    ptx::cp_async_commit();
    if (num_stages > 1) load(1);
    ptx::cp_async_commit();
#pragma unroll 1
    for (std::int32_t u = 0; u < num_stages; ++u) {
      ptx::cp_async_wait<1>();
      __syncthreads();  // stage u landed for everyone, and everyone is done with stage u - 1
      if (u + 2 < num_stages) load(u + 2);
      ptx::cp_async_commit();
      if (pass == 1 && u > 0) join_stage(u - 1);

      asm volatile("" : "+r"(thread));  // opaque: what is derived from it would take registers from stage to stage
      float s[kRowBlocks][kStageColumns / 2] = {};
      multiply_stage<kType, kHeadDim, kRowBlocks>(
          s, q, ring + static_cast<std::uint32_t>(u % kStages * Shape::kStageBytes), lane());

      if ((u + 1) * kStageColumns > tile.common_end) {
        const std::int32_t first_column = u * kStageColumns + lane() % 4 * kLaneColumns;  // of this thread
#pragma unroll
        for (std::int32_t b = 0; b < kRowBlocks; ++b) {
#pragma unroll
          for (std::int32_t h = 0; h < 2; ++h) {
            const std::int32_t row = row_of(b, h);
            const std::int32_t sees = (tile.first_view + row / tile.view_rows) >> args.column_tokens_log2;
            const std::int32_t visible = row < tile.rows ? sees - first_column : 0;
#pragma unroll
            for (std::int32_t k = 0; k < kLaneColumns; ++k) {
              if (k >= visible) s[b][fragment_index(k, h)] = -INFINITY;
            }
          }
        }
      }

      if (pass == 0) {
#pragma unroll
        for (std::int32_t b = 0; b < kRowBlocks; ++b) {
#pragma unroll
          for (std::int32_t h = 0; h < 2; ++h) {
            float largest = s[b][2 * h];
#pragma unroll
            for (std::int32_t k = 1; k < kLaneColumns; ++k) largest = fmaxf(largest, s[b][fragment_index(k, h)]);
            const float new_max = fmaxf(row_max[b][h], ptx::quad_max(largest));
            const float shift = new_max == -INFINITY ? 0.0f : new_max * args.scale_log2;
            float sum_even = row_sum[b][h] * ptx::fast_exp2(fmaf(row_max[b][h], args.scale_log2, -shift)),
                  sum_odd = 0.0f;
#pragma unroll
            for (std::int32_t k = 0; k < kLaneColumns; k += 2) {
              sum_even += ptx::fast_exp2(fmaf(s[b][fragment_index(k, h)], args.scale_log2, -shift));
              sum_odd += ptx::fast_exp2(fmaf(s[b][fragment_index(k + 1, h)], args.scale_log2, -shift));
            }
            row_max[b][h] = new_max;
            row_sum[b][h] = sum_even + sum_odd;
          }
        }
        continue;
      }

#pragma unroll
      for (std::int32_t b = 0; b < kRowBlocks; ++b) {
#pragma unroll
        for (std::int32_t i = 0; i < kStageColumns / 2; ++i) {
          s[b][i] = ptx::fast_exp2(fmaf(s[b][i], args.scale_log2, -row_max[b][i / 2 % 2]));  // now the log-sum-exp
        }
      }
      float* sums = parts.sum[u % 2][warp()];
      float* peaks = parts.peak[u % 2][warp()];
      switch (page_log2) {
        case 0: join_pages<16>(s, lane(), sums, peaks); break;
        case 1: join_pages<8>(s, lane(), sums, peaks); break;
        case 2: join_pages<4>(s, lane(), sums, peaks); break;
        case 3: join_pages<2>(s, lane(), sums, peaks); break;
        case 4: join_pages<1>(s, lane(), sums, peaks); break;
        default: {  // several threads, perhaps several stages: no peaks
          float sum[1] = {0.0f};
#pragma unroll
          for (std::int32_t b = 0; b < kRowBlocks; ++b) {
#pragma unroll
            for (std::int32_t i = 0; i < kStageColumns / 2; ++i) sum[0] += s[b][i];
          }
          join_lanes(sum, lane(), [](float a, float b) { return a + b; });
          sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 1);
          if (page_log2 >= 6) sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 2);
          const bool page_begins = ((u * kStageColumns) & ((1 << page_log2) - 1)) == 0;
          long_page = page_begins ? sum[0] : long_page + sum[0];
          if (lane() < 4 && (page_log2 == 5 ? lane() % 2 == 0 : lane() == 0)) {
            sums[lane() / 2] = long_page;
            peaks[lane() / 2] = 0.0f;
          }
        }
      }
    }
    ptx::cp_async_wait<0>();
    if (pass == 1) break;

      // A row without a finite, positive sum has a NaN or +inf score, or -inf only.
#pragma unroll
    for (std::int32_t b = 0; b < kRowBlocks; ++b) {
#pragma unroll
      for (std::int32_t h = 0; h < 2; ++h) {
        const float sum = ptx::quad_sum(row_sum[b][h]);
        const bool exists = row_of(b, h) < tile.rows;
        if (lane() % 4 == 0 && exists && !(sum > 0.0f && sum < INFINITY)) atomicAdd(&num_bad_rows, 1);
        row_max[b][h] = exists ? fmaf(row_max[b][h], args.scale_log2, log2f(sum)) : INFINITY;
      }
    }
    __syncthreads();  // all stages are free
    if (num_bad_rows > 0) break;
  }

  __syncthreads();
  if (num_bad_rows == 0) join_stage(num_stages - 1);
  if (threadIdx.x < kStageColumns) chunk_parts[threadIdx.x] = chunk_part;
  __syncthreads();
  if (threadIdx.x != 0) return;
  args.rows.nonfinite[tile.score_row] = num_bad_rows;
  if (args.rows.elsewhere != nullptr) {
    float sum = 0.0f;
    for (const float part : chunk_parts) sum += part;
    args.rows.elsewhere[tile.score_row] = sum;
  }
  if (args.rows.scored_pages != nullptr) {
    args.rows.scored_pages[tile.score_row] = (tile.end + (1 << page_log2) - 1) >> page_log2;
  }
}

template <std::int32_t kHeadDim>
cudaError_t launch(const MassArgs& args, DType dtype, bool pdl, cudaStream_t stream) {
  using Shape = MassShape<kHeadDim>;
  const auto kernel = dtype == DType::kF16 ? mass_scores_kernel<ptx::MmaType::kF16, kHeadDim>
                                           : mass_scores_kernel<ptx::MmaType::kBf16, kHeadDim>;
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSmemBytes);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, args.rows.max_blocks * args.rows.mask_heads, Shape::kThreads, Shape::kSmemBytes, pdl,
                       stream, args);
}

MassArgs make_args(const ScoreArgs& args, const ScoreRows& rows, float scale) {
  MassArgs mass{};
  mass.step = args.step;
  mass.page_tokens = args.page_tokens;
  mass.group = args.group;
  mass.scale_log2 = scale * std::numbers::log2e_v<float>;
  mass.rows = rows;
  return mass;
}

cudaError_t launch_any(const MassArgs& mass, const ScoreArgs& args, cudaStream_t stream) {
  switch (args.head_dim) {
    case 64: return launch<64>(mass, args.kv.dtype, args.pdl, stream);
    case 128: return launch<128>(mass, args.kv.dtype, args.pdl, stream);
    case 256: return launch<256>(mass, args.kv.dtype, args.pdl, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

std::int64_t oracle_scratch_bytes(const ScoreArgs&, const ScoreRows&) { return 0; }
std::int64_t sub_mean_scratch_bytes(const ScoreArgs& args, const ScoreRows&) {
  return sub_mean_sm90_scratch_bytes(args);
}

cudaError_t launch_oracle_scores(const ScoreArgs& args, const ScoreRows& rows, cudaStream_t stream) {
  MassArgs mass = make_args(args, rows, args.softmax_scale);
  mass.columns = {.data = static_cast<const std::uint16_t*>(args.kv.k),
                  .page_stride = args.kv.page_stride,
                  .head_stride = args.kv.head_stride,
                  .column_stride = args.kv.token_stride,
                  .page_columns_log2 = log2_exact(args.page_tokens)};
  mass.tile_heads = 1;
  return launch_any(mass, args, stream);
}

cudaError_t launch_mean_key_scores(const ScoreArgs& args, const ScoreRows& rows, const MeanKeyOptions& options,
                                   cudaStream_t stream) {
  MassArgs mass = make_args(args, rows, args.softmax_scale);
  mass.columns = {.data = args.summaries.mean_k,
                  .page_stride = std::int64_t{args.num_kv_heads} * args.head_dim,
                  .head_stride = args.head_dim,
                  .column_stride = args.head_dim,
                  .page_columns_log2 = 0};
  mass.column_tokens_log2 = log2_exact(args.page_tokens);
  mass.one_view = options.visible == PageVisibility::kFull;
  mass.tile_heads = options.tile == TileShape::kPacked ? args.group : 1;
  const bool peak = options.vote == RowVote::kMax;
  mass.mean_weight = peak ? 0.0f : 1.0f;
  mass.peak_weight = peak ? 1.0f : 0.0f;
  return launch_any(mass, args, stream);
}

cudaError_t launch_sub_mean_scores(const ScoreArgs& args, const ScoreRows& rows, const SubMeanOptions& options,
                                   cudaStream_t stream) {
  if (const std::int64_t bytes = sub_mean_sm90_scratch_bytes(args); bytes > 0 && args.scratch_bytes >= bytes) {
    return launch_sub_mean_sm90(args, rows, options, stream);
  }
  MassArgs mass = make_args(args, rows, args.softmax_scale * options.temperature);
  const std::int32_t granule = granule_tokens(args.page_tokens);
  const std::int32_t page_granules = args.page_tokens / granule;
  mass.columns = {.data = args.summaries.sub_mean_k,
                  .page_stride = std::int64_t{args.num_kv_heads} * page_granules * args.head_dim,
                  .head_stride = std::int64_t{page_granules} * args.head_dim,
                  .column_stride = args.head_dim,
                  .page_columns_log2 = log2_exact(page_granules)};
  mass.column_tokens_log2 = log2_exact(granule);
  mass.tile_heads = args.group;
  mass.peak_weight = options.peak_weight;
  return launch_any(mass, args, stream);
}

}  // namespace compact
