// Scores of `quoka` (quoka.h): two kernels.
//
//   pick    a CTA per (query block, KV head): cosines of the block's queries with their mean in fp64, as on the CPU,
//           because the order of close cosines decides who is picked; the mean of the picked over the heads is rounded
//           to 16 bits, which moves a cosine by at most 2^-9 (bf16) or 2^-12 (fp16)
//   score   the picked queries of some neighbouring blocks share a tile of 128 rows, against all keys of the past:
//           q . k / max(norm of k, least norm), the maximum over the tokens of a page and the rows of a block. Maxima
//           have no order, so that CTAs share the pages of a tile
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "src/core/count_bits.h"
#include "src/core/launch_kernel.h"
#include "src/ptx/control.cuh"
#include "src/ptx/max_nan.cuh"
#include "src/ptx/shared_address.cuh"
#include "src/ptx/unpack.cuh"
#include "src/select/cuda/score_columns.cuh"
#include "src/select/cuda/scores.h"

namespace compact {
namespace {

constexpr float kLeastNorm = 1e-6f;  // a shorter key or query counts as this long
constexpr std::int32_t kRows = 128;
constexpr std::int32_t kMaxTokens = 128;  // of a query block
constexpr std::int32_t kPickThreads = 256;
constexpr std::int32_t kStages = 3;

struct QuokaArgs {
  StepQueries step;
  ScoreColumns columns;
  const float* norms;  // [num_pages, Hkv, P]
  std::int32_t head_dim;
  std::int32_t num_kv_heads;
  std::int32_t group;
  std::int32_t page_tokens;
  std::int32_t block_tokens;
  std::int32_t picked;      // of a block of that many tokens or more
  std::int32_t block_rows;  // picked, rounded up to 16
  std::int32_t run_blocks;  // blocks that share a tile
  double inverse_group;     // 1 / G
  std::int32_t splits;      // CTAs that share the pages of a tile
  std::uint16_t* queries;   // [Hkv, max_blocks, block_rows, D]  a short block repeats its first
  ScoreRows rows;
};

// 1 / sqrt(x) for normal x, by Newton's steps from an estimate of at least 20 bits: no subroutine, which would spill.
__device__ __forceinline__ double inverse_root(double x) {
  double y;
  asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
#pragma unroll
  for (std::int32_t step = 0; step < 3; ++step) y = fma(y * 0.5, fma(-x * y, y, 1.0), y);
  return y;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (std::int32_t offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

template <ptx::MmaType kType>
__global__ void __launch_bounds__(kPickThreads, 2) quoka_pick_kernel(const __grid_constant__ QuokaArgs args) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto* scales = reinterpret_cast<double*>(shared_memory);                            // [G, picked]
  auto* tokens = reinterpret_cast<std::int32_t*>(scales + args.group * args.picked);  // [G, picked]
  __shared__ double mean[256], cosines[kMaxTokens], squares[kMaxTokens];
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const std::int32_t block_idx = static_cast<std::int32_t>(blockIdx.x) / args.num_kv_heads;
  const std::int32_t kv_head = static_cast<std::int32_t>(blockIdx.x) - block_idx * args.num_kv_heads;
  if (block_idx >= args.step.tables.header->num_blocks) return;
  const QueryBlock block = args.step.tables.blocks[block_idx];
  if (block.tokens == 0 || !has_choice(args.step.tables.chunks[block.chunk], args.page_tokens)) return;
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  const std::int32_t lane = thread % 32, warp = thread / 32;
  const std::int32_t count = min(args.picked, block.tokens);
  const auto row = [&](std::int32_t t, std::int32_t h) {
    return args.step.q + (block.q_begin + t) * args.step.q_token_stride +
           (kv_head * args.group + h) * args.step.q_head_stride;
  };

  std::int32_t bad_rows = 0;
#pragma unroll 1
  for (std::int32_t h = 0; h < args.group; ++h) {
    // The length of the mean scales all cosines alike: a sum will do.
    for (std::int32_t d = 2 * thread; d < args.head_dim; d += 2 * kPickThreads) {
      double low = 0, high = 0;
#pragma unroll 4
      for (std::int32_t t = 0; t < block.tokens; ++t) {
        const float2 x = ptx::unpack_pair<kType>(*reinterpret_cast<const std::uint32_t*>(row(t, h) + d));
        low += double{x.x};
        high += double{x.y};
      }
      mean[d] = low;
      mean[d + 1] = high;
    }
    __syncthreads();
    for (std::int32_t t = warp; t < block.tokens; t += kPickThreads / 32) {
      double square = 0, dot = 0;
      for (std::int32_t d = 2 * lane; d < args.head_dim; d += 64) {
        const float2 x = ptx::unpack_pair<kType>(*reinterpret_cast<const std::uint32_t*>(row(t, h) + d));
        square += double{x.x} * double{x.x} + double{x.y} * double{x.y};
        dot += double{x.x} * mean[d] + double{x.y} * mean[d + 1];
      }
      square = warp_sum(square);
      dot = warp_sum(dot);
      if (lane == 0) {
        squares[t] = square;
        cosines[t] = dot;
      }
    }
    __syncthreads();
    const bool has_token = thread < block.tokens;
    const double square = has_token ? squares[thread] : 0.0;
    const double inverse_norm = inverse_root(fmax(square, double{kLeastNorm} * double{kLeastNorm}));
    if (has_token) cosines[thread] *= inverse_norm;
    bad_rows += __syncthreads_count(!(square < INFINITY));
    if (has_token && bad_rows == 0) {  // NaN has no rank
      std::int32_t rank = block.tokens > args.picked ? 0 : thread;
      for (std::int32_t t = 0; t < block.tokens && block.tokens > args.picked; ++t) {
        rank += cosines[t] < cosines[thread] || (cosines[t] == cosines[thread] && t < thread) ? 1 : 0;
      }
      if (rank < count) {
        tokens[h * args.picked + rank] = thread;
        scales[h * args.picked + rank] = inverse_norm * args.inverse_group;
      }
    }
    __syncthreads();
  }

  const std::int64_t score_row = std::int64_t{kv_head} * args.rows.max_blocks + block_idx;
  if (thread == 0) args.rows.nonfinite[score_row] = bad_rows;
  const std::int32_t pairs = args.head_dim / 2;
  auto* out = reinterpret_cast<std::uint32_t*>(args.queries + score_row * args.block_rows * args.head_dim);
  for (std::int32_t i = thread; i < args.block_rows * pairs; i += kPickThreads) {
    const std::int32_t n = i / pairs < count ? i / pairs : 0;
    const std::int32_t d = i % pairs * 2;
    double low = 0, high = 0;
    for (std::int32_t h = 0; h < args.group && bad_rows == 0; ++h) {
      const std::uint16_t* q = row(tokens[h * args.picked + n], h);
      const float2 x = ptx::unpack_pair<kType>(*reinterpret_cast<const std::uint32_t*>(q + d));
      low += double{x.x} * scales[h * args.picked + n];
      high += double{x.y} * scales[h * args.picked + n];
    }
    out[i] = ptx::pack_pair<kType>(static_cast<float>(low), static_cast<float>(high));
  }
}

// The pages [first_page, end_page) of a run's past, in shared memory.
struct QuokaTile {
  const std::int32_t* table;
  std::int32_t kv_head;
  std::int32_t first_block;
  std::int32_t blocks;
  std::int32_t first_page, end_page;
};

template <std::int32_t kHeadDim>
struct QuokaShape {
  static constexpr std::int32_t kRowBlocks = kHeadDim == 256 ? 1 : 2;  // m16 blocks of a warp
  static constexpr std::int32_t kWarps = kRows / 16 / kRowBlocks;
  static constexpr std::int32_t kThreads = 32 * kWarps;
  static constexpr std::int32_t kStageBytes = kStageColumns * kHeadDim * 2;
  static constexpr std::int32_t kSmemBytes = kStages * kStageBytes;
  static constexpr std::int32_t kCtasPerSm = kHeadDim == 256 ? 1 : 3;
};

template <ptx::MmaType kType, std::int32_t kHeadDim>
__global__ void __launch_bounds__(QuokaShape<kHeadDim>::kThreads, QuokaShape<kHeadDim>::kCtasPerSm)
    quoka_score_kernel(const __grid_constant__ QuokaArgs args) {
  using Shape = QuokaShape<kHeadDim>;
  constexpr std::int32_t kRowBlocks = Shape::kRowBlocks;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  __shared__ __align__(16) float stage_norms[kStages][kStageColumns];
  __shared__ float parts[2][kRows / 16][kStageColumns / 16];  // best scores of 16 rows in the pages of a stage
  __shared__ QuokaTile tile;
  const std::uint32_t ring = ptx::shared_address(shared_memory);

  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  if (threadIdx.x == 0) {
    const auto index = static_cast<std::int32_t>(blockIdx.x);
    const std::int32_t split = index % args.splits;
    const std::int32_t block_idx = index / args.splits / args.num_kv_heads;
    tile.blocks = 0;
    if (block_idx < args.step.tables.header->num_blocks) {
      const QueryBlock block = args.step.tables.blocks[block_idx];
      const StepChunk chunk = args.step.tables.chunks[block.chunk];
      const std::int32_t in_chunk = block_idx - chunk.first_block;
      if (has_choice(chunk, args.page_tokens) && in_chunk % args.run_blocks == 0) {
        const std::int32_t left = num_runs(chunk.chunk_start, chunk.chunk_tokens, args.block_tokens) - in_chunk;
        const std::int32_t past_pages = chunk.chunk_start / args.page_tokens;
        const std::int32_t whole = kStageColumns > args.page_tokens ? kStageColumns / args.page_tokens : 1;
        const std::int32_t share = ((past_pages + args.splits - 1) / args.splits + whole - 1) / whole * whole;
        tile.table = args.step.page_tables + chunk.table_row * args.step.page_table_stride;
        tile.kv_head = index / args.splits % args.num_kv_heads;
        tile.first_block = block_idx;
        tile.first_page = min(split * share, past_pages);
        tile.end_page = min((split + 1) * share, past_pages);
        tile.blocks = tile.first_page < tile.end_page ? min(args.run_blocks, left) : 0;
      }
    }
  }
  __syncthreads();
  if (tile.blocks == 0) return;

  auto thread = static_cast<std::int32_t>(threadIdx.x);
  const auto lane = [&] { return thread % 32; };
  const std::int32_t page_log2 = args.columns.page_columns_log2;
  const std::int32_t begin = tile.first_page << page_log2, end = tile.end_page << page_log2;
  const std::int32_t num_stages = (end - begin + kStageColumns - 1) / kStageColumns;
  const std::int64_t first_row = std::int64_t{tile.kv_head} * args.rows.max_blocks + tile.first_block;
  const auto load = [&](std::int32_t u) {
    const std::int32_t first = begin + u * kStageColumns;
    load_columns<kHeadDim, Shape::kThreads>(ring + static_cast<std::uint32_t>(u % kStages * Shape::kStageBytes),
                                            args.columns, tile.table, tile.kv_head, first, end);
    if (threadIdx.x < kStageColumns / 4) {
      const std::int32_t column = 4 * static_cast<std::int32_t>(threadIdx.x);
      const bool valid = first + column < end;
      const std::int64_t record =
          valid ? std::int64_t{tile.table[(first + column) >> page_log2]} * args.num_kv_heads + tile.kv_head : 0;
      ptx::cp_async_16(ptx::shared_address(&stage_norms[u % kStages][column]),
                       args.norms + (record << page_log2) + ((first + column) & ((1 << page_log2) - 1)), valid);
    }
  };
  load_packed_queries<kHeadDim, kRows, Shape::kThreads>(ring + Shape::kStageBytes,
                                                        args.queries + first_row * args.block_rows * kHeadDim, kHeadDim,
                                                        0, 0, 0, 1, tile.blocks * args.block_rows);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  std::uint32_t q[kRowBlocks][kHeadDim / 16][4];
  load_fragments<kHeadDim, kRowBlocks>(q, ring + Shape::kStageBytes, thread / 32 * kRowBlocks * 16, lane());
  __syncthreads();  // stages 1 and 2 are free

  float long_page[kRowBlocks];  // of a page of more than 64 tokens, so far
  // The pages that end with this stage, one thread for each and each block.
  const auto join_stage = [&](std::int32_t u) {
    const std::int32_t first_column = begin + u * kStageColumns;
    const std::int32_t pages = page_log2 >= 6 ? 1 : kStageColumns >> page_log2;
    const std::int32_t i = static_cast<std::int32_t>(threadIdx.x);
    if (i >= pages * tile.blocks || ((first_column + kStageColumns) & ((1 << page_log2) - 1)) != 0) return;
    const std::int32_t b = i / pages;
    const std::int32_t page = (first_column >> page_log2) + i % pages;
    if (page >= tile.end_page) return;
    float best = -INFINITY;
    for (std::int32_t part = 0; part < args.block_rows / 16; ++part) {
      best = ptx::max_nan(best, parts[u % 2][b * args.block_rows / 16 + part][i % pages]);
    }
    args.rows.scores[(first_row + b) * args.rows.row_stride + page] = best;
    if (!(fabsf(best) < INFINITY)) {  // a bad key is bad for all of them: everyone who finds one writes the same
      args.rows.nonfinite[first_row + b] = min(args.picked, args.step.tables.blocks[tile.first_block + b].tokens);
    }
  };

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
    if (u > 0) join_stage(u - 1);

    asm volatile("" : "+r"(thread));  // opaque: what is derived from it would take registers from stage to stage
    float s[kRowBlocks][kStageColumns / 2] = {};
    multiply_stage<kType, kHeadDim, kRowBlocks>(
        s, q, ring + static_cast<std::uint32_t>(u % kStages * Shape::kStageBytes), lane());
    float best[kRowBlocks];
#pragma unroll
    for (std::int32_t b = 0; b < kRowBlocks; ++b) best[b] = -INFINITY;
#pragma unroll
    for (std::int32_t k = 0; k < kLaneColumns; ++k) {
      const float inverse =
          __fdividef(1.0f, fmaxf(stage_norms[u % kStages][lane() % 4 * kLaneColumns + k], kLeastNorm));
#pragma unroll
      for (std::int32_t b = 0; b < kRowBlocks; ++b) {
#pragma unroll
        for (std::int32_t h = 0; h < 2; ++h) {
          best[b] = ptx::max_nan(best[b], s[b][fragment_index(k, h)] * inverse);
        }
      }
    }
    const bool page_begins = ((begin + u * kStageColumns) & ((1 << page_log2) - 1)) == 0;
#pragma unroll
    for (std::int32_t b = 0; b < kRowBlocks; ++b) {
      float value[1] = {best[b]};
      join_lanes(value, lane(), [](float a, float c) { return ptx::max_nan(a, c); });
      if (page_log2 >= 5) value[0] = ptx::max_nan(value[0], __shfl_xor_sync(0xffffffffu, value[0], 1));
      if (page_log2 >= 6) value[0] = ptx::max_nan(value[0], __shfl_xor_sync(0xffffffffu, value[0], 2));
      long_page[b] = page_begins ? value[0] : ptx::max_nan(long_page[b], value[0]);
      const std::int32_t lanes = page_log2 >= 6 ? 4 : 1 << (page_log2 - 4);  // of the quad that have the same page
      if (lane() < 4 && lane() % lanes == 0) {
        parts[u % 2][thread / 32 * kRowBlocks + b][lane() / lanes] = long_page[b];
      }
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  join_stage(num_stages - 1);
}

template <std::int32_t kHeadDim>
cudaError_t launch_score(const QuokaArgs& args, DType dtype, bool pdl, cudaStream_t stream) {
  using Shape = QuokaShape<kHeadDim>;
  const auto kernel = dtype == DType::kF16 ? quoka_score_kernel<ptx::MmaType::kF16, kHeadDim>
                                           : quoka_score_kernel<ptx::MmaType::kBf16, kHeadDim>;
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSmemBytes);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, args.rows.max_blocks * args.num_kv_heads * args.splits, Shape::kThreads,
                       Shape::kSmemBytes, pdl, stream, args);
}

std::int32_t picked_rows(const ScoreArgs& args, const QuokaOptions& options) {
  return options.picked_queries < args.block_tokens ? options.picked_queries : args.block_tokens;
}
std::int32_t round_up(std::int32_t value, std::int32_t to) { return (value + to - 1) / to * to; }

}  // namespace

std::int64_t quoka_scratch_bytes(const ScoreArgs& args, const ScoreRows& rows, const QuokaOptions& options) {
  return std::int64_t{rows.mask_heads} * rows.max_blocks * round_up(picked_rows(args, options), 16) * args.head_dim * 2;
}

cudaError_t launch_quoka_scores(const ScoreArgs& args, const ScoreRows& rows, const QuokaOptions& options,
                                cudaStream_t stream) {
  if (args.block_tokens > kMaxTokens || args.scratch_bytes < quoka_scratch_bytes(args, rows, options)) {
    return cudaErrorInvalidValue;
  }
  QuokaArgs quoka{};
  quoka.step = args.step;
  quoka.columns = {.data = static_cast<const std::uint16_t*>(args.kv.k),
                   .page_stride = args.kv.page_stride,
                   .head_stride = args.kv.head_stride,
                   .column_stride = args.kv.token_stride,
                   .page_columns_log2 = log2_exact(args.page_tokens)};
  quoka.norms = args.summaries.norm_k;
  quoka.head_dim = args.head_dim;
  quoka.num_kv_heads = args.num_kv_heads;
  quoka.group = args.group;
  quoka.inverse_group = 1.0 / args.group;
  quoka.page_tokens = args.page_tokens;
  quoka.block_tokens = args.block_tokens;
  quoka.picked = picked_rows(args, options);
  quoka.block_rows = round_up(quoka.picked, 16);
  quoka.run_blocks = kRows / quoka.block_rows;
  quoka.queries = static_cast<std::uint16_t*>(args.scratch);
  quoka.rows = rows;
  // Enough CTAs for three waves of three an SM, but no fewer than 8 stages each.
  const std::int32_t tiles = (rows.max_blocks + quoka.run_blocks - 1) / quoka.run_blocks * args.num_kv_heads;
  const std::int32_t most = args.max_context_tokens / (8 * kStageColumns) + 1;
  const std::int32_t wanted = (9 * args.num_sms + tiles - 1) / tiles;
  quoka.splits = std::clamp(wanted, 1, most);

  const auto pick =
      args.kv.dtype == DType::kF16 ? quoka_pick_kernel<ptx::MmaType::kF16> : quoka_pick_kernel<ptx::MmaType::kBf16>;
  const std::int32_t pick_bytes = quoka.group * quoka.picked * 12;
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(pick),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, pick_bytes);
  if (error != cudaSuccess) return error;
  error = launch_kernel(pick, rows.max_blocks * args.num_kv_heads, kPickThreads, pick_bytes, args.pdl, stream, quoka);
  if (error != cudaSuccess) return error;
  switch (args.head_dim) {
    case 64: return launch_score<64>(quoka, args.kv.dtype, args.pdl, stream);
    case 128: return launch_score<128>(quoka, args.kv.dtype, args.pdl, stream);
    case 256: return launch_score<256>(quoka, args.kv.dtype, args.pdl, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace compact
