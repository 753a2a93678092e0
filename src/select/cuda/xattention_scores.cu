// Scores of `xattention` (xattention.h): two kernels.
//
//   products  the strided rows of some neighbouring query blocks, all heads of a KV head, against all strided columns:
//             a matrix product of st x D dimensions, 128 rows x 128 columns at a time, in steps of 64 dimensions. Of
//             the scores only log2 of the sum of 2^score over the columns of a page stays, for each row; pages of
//             more than 64 columns leave one for every 64
//   sums      a CTA per (query head, query block): each row's log-sum-exp over its pages, then A
//
// CTAs share the columns of a tile, since nothing joins them before the second kernel.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>

#include "src/core/count_bits.h"
#include "src/core/launch_kernel.h"
#include "src/ptx/control.cuh"
#include "src/ptx/log2.cuh"
#include "src/ptx/quad.cuh"
#include "src/ptx/shared_address.cuh"
#include "src/select/cuda/score_columns.cuh"
#include "src/select/cuda/scores.h"

namespace compact {
namespace {

constexpr std::int32_t kRows = 128;     // of a tile
constexpr std::int32_t kColumns = 128;  // of a tile: two warps side by side
constexpr std::int32_t kDepth = 64;     // dimensions of a stage
constexpr std::int32_t kStages = 3;
constexpr std::int32_t kThreads = 256;
constexpr std::int32_t kPieces = kDepth / 8;
constexpr std::int32_t kRowsPerPass = kThreads / kPieces;
constexpr std::int32_t kPartBytes = kRows * kDepth * 2;  // of a stage: queries, then keys
constexpr std::int32_t kStageBytes = 2 * kPartBytes;
constexpr std::int32_t kSumThreads = 256;
static_assert(kRows == kColumns);

struct XAttentionArgs {
  StepQueries step;
  PagedKvView kv;
  std::int32_t group;  // G
  std::int32_t block_tokens;
  std::int32_t page_tokens_log2;   // P
  std::int32_t stride_log2;        // st
  std::int32_t block_rows;         // strided rows of a block, of one head
  std::int32_t run_blocks;         // blocks that share a tile
  std::int32_t row_tiles;          // tiles of a run: above 1 only if it is one block
  std::int32_t splits;             // CTAs that share the columns of a tile
  std::int32_t part_columns_log2;  // columns of a page that leave one number together, at most 64
  std::int64_t part_stride;        // numbers of a row
  float scale_log2;                // softmax scale * log2(e)
  float* parts;                    // [Hq, max_blocks, block_rows, part_stride]  log2 of sums of 2^score
  ScoreRows rows;
};

// What exists of strided row i (StridedRows of xattention.h).
struct StridedRow {
  std::int32_t queries;     // tokens of the chunk in it; 0 or less: none
  std::int32_t visible;     // columns that it sees
  std::int32_t last_pairs;  // pairs with its own column
};
__device__ __forceinline__ StridedRow strided_row(const StepChunk& chunk, std::int32_t i, std::int32_t stride) {
  const std::int32_t context = chunk.chunk_start + chunk.chunk_tokens;
  const std::int32_t first = max(0, chunk.chunk_start - stride * i), end = min(stride, context - stride * i);
  const std::int32_t keys = min(stride, context - stride * i);
  StridedRow row;
  row.queries = end - first;
  row.last_pairs = max(0, end - max(first, stride - keys));
  row.visible = row.queries <= 0 ? 0 : row.last_pairs > 0 ? i + 1 : i;
  return row;
}

struct TileRow {
  std::int64_t query;     // element of its head in token 0 of Q
  std::int64_t part;      // element in `parts`; below 0: no row
  std::int32_t position;  // of its last token
  std::int32_t visible;
  float scale;       // of a product, base 2, divided by the number of pairs
  float own_factor;  // of its own column, which may have fewer pairs
};

struct XAttentionTile {
  const std::int32_t* table;
  std::int32_t kv_head;
  std::int32_t q_begin, chunk_start, context;
  std::int32_t first_tile, num_tiles;  // of columns; 0: nothing to do
};

// Numbers of a thread's columns in one row, by pages of kLaneColumns / kParts columns.
template <std::int32_t kParts>
__device__ __forceinline__ void store_parts(const float (&z)[kLaneColumns], float* to, std::int64_t room) {
  constexpr std::int32_t kOfPart = kLaneColumns / kParts;
#pragma unroll
  for (std::int32_t part = 0; part < kParts; ++part) {
    float largest = z[part * kOfPart];
#pragma unroll
    for (std::int32_t k = 1; k < kOfPart; ++k) largest = fmaxf(largest, z[part * kOfPart + k]);
    const float shift = largest == -INFINITY ? 0.0f : largest;
    float sum = 0.0f;
#pragma unroll
    for (std::int32_t k = 0; k < kOfPart; ++k) sum += ptx::fast_exp2(z[part * kOfPart + k] - shift);
    if (part < room) to[part] = shift + ptx::fast_log2(sum);
  }
}

template <ptx::MmaType kType>
__global__ void __launch_bounds__(kThreads, 2) xattention_products_kernel(const __grid_constant__ XAttentionArgs args) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  __shared__ TileRow tile_rows[kRows];
  __shared__ XAttentionTile tile;
  const std::uint32_t ring = ptx::shared_address(shared_memory);
  const std::int32_t stride = 1 << args.stride_log2;

  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  {
    // Tiles of one chunk side by side: they read the same keys.
    auto index = static_cast<std::int32_t>(blockIdx.x);
    const std::int32_t row_tile = index % args.row_tiles;
    index /= args.row_tiles;
    const std::int32_t block_idx = index % args.rows.max_blocks;
    index /= args.rows.max_blocks;
    const std::int32_t split = index % args.splits, kv_head = index / args.splits;
    if (block_idx >= args.step.tables.header->num_blocks) return;
    const QueryBlock block = args.step.tables.blocks[block_idx];
    const StepChunk chunk = args.step.tables.chunks[block.chunk];
    const std::int32_t in_chunk = block_idx - chunk.first_block;
    if (!has_choice(chunk, 1 << args.page_tokens_log2) || in_chunk % args.run_blocks != 0) return;
    const std::int32_t context = chunk.chunk_start + chunk.chunk_tokens;
    const std::int32_t first_i = block.first_position / args.block_tokens * args.block_rows;
    const std::int32_t end_i =
        min(first_i + args.run_blocks * args.block_rows, (context + stride - 1) >> args.stride_log2);
    const std::int32_t all_tiles = (end_i + kColumns - 1) / kColumns;
    const std::int32_t share = (all_tiles + args.splits - 1) / args.splits;
    if (threadIdx.x == 0) {
      tile.table = args.step.page_tables + chunk.table_row * args.step.page_table_stride;
      tile.kv_head = kv_head;
      tile.q_begin = chunk.q_begin;
      tile.chunk_start = chunk.chunk_start;
      tile.context = context;
      tile.first_tile = split * share;
      tile.num_tiles = min(share, all_tiles - split * share);
    }
    for (auto r = static_cast<std::int32_t>(threadIdx.x); r < kRows; r += kThreads) {
      const std::int32_t in_run = (row_tile * kRows + r) / args.group;
      const std::int32_t head = kv_head * args.group + row_tile * kRows + r - in_run * args.group;
      const std::int32_t i = first_i + in_run;
      const StridedRow strided = strided_row(chunk, i, stride);
      const bool exists = i < end_i && strided.queries > 0;
      TileRow row{};
      row.query = head * args.step.q_head_stride;
      row.part = exists ? (((std::int64_t{head} * args.rows.max_blocks + block_idx + in_run / args.block_rows) *
                            args.block_rows) +
                           in_run % args.block_rows) *
                              args.part_stride
                        : -1;
      row.position = exists ? stride * i + stride - 1 : -stride;  // no token of the chunk
      row.visible = exists ? strided.visible : 0;
      row.scale = exists ? args.scale_log2 / static_cast<float>(strided.queries) : 0.0f;
      row.own_factor =
          strided.last_pairs > 0 ? static_cast<float>(strided.queries) / static_cast<float>(strided.last_pairs) : 0.0f;
      tile_rows[r] = row;
    }
  }
  __syncthreads();
  if (tile.num_tiles <= 0) return;

  auto thread = static_cast<std::int32_t>(threadIdx.x);
  const auto lane = [&] { return thread % 32; };
  const std::int32_t column_steps = stride * args.kv.head_dim / kDepth;  // of one column tile
  const std::int32_t num_steps = tile.num_tiles * column_steps;
  const auto load = [&](std::int32_t n) {
    std::int32_t own = static_cast<std::int32_t>(threadIdx.x);
    asm volatile("" : "+r"(own), "+r"(n));  // opaque: nothing derived from it is kept from stage to stage
    const std::int32_t column_tile = n / column_steps;
    const std::int32_t first_dim = (n - column_tile * column_steps) * kDepth;
    const std::int32_t u = first_dim / args.kv.head_dim;  // key in its column
    const std::int32_t dim = first_dim - u * args.kv.head_dim + own % kPieces * 8;
    const std::uint32_t stage = ring + static_cast<std::uint32_t>(n % kStages * kStageBytes);
#pragma unroll
    for (std::int32_t pass = 0; pass < kRows / kRowsPerPass; ++pass) {
      const std::int32_t r = own / kPieces + pass * kRowsPerPass;
      const std::int32_t position = tile_rows[r].position - u;
      const bool valid = position >= tile.chunk_start && position < tile.context;
      const std::int64_t from =
          valid ? tile_rows[r].query + (tile.q_begin + position - tile.chunk_start) * args.step.q_token_stride : 0;
      ptx::cp_async_16(stage + ptx::swizzled_piece_offset<kDepth>(r, own % kPieces), args.step.q + from + dim, valid);
    }
    const auto* keys = static_cast<const std::uint16_t*>(args.kv.k) + tile.kv_head * args.kv.head_stride + dim;
    const std::int32_t first_column = (tile.first_tile + column_tile) * kColumns;
#pragma unroll
    for (std::int32_t pass = 0; pass < kColumns / kRowsPerPass; ++pass) {
      const std::int32_t r = own / kPieces + pass * kRowsPerPass;
      const std::int32_t column = first_column + r / kStageColumns * kStageColumns + column_of_row(r % kStageColumns);
      const std::int32_t x = (column << args.stride_log2) + u;
      const bool valid = x < tile.context;
      const std::int64_t from = valid ? tile.table[x >> args.page_tokens_log2] * args.kv.page_stride +
                                            (x & ((1 << args.page_tokens_log2) - 1)) * args.kv.token_stride
                                      : 0;
      ptx::cp_async_16(stage + kPartBytes + ptx::swizzled_piece_offset<kDepth>(r, own % kPieces), keys + from, valid);
    }
  };

  float s[2][kStageColumns / 2] = {};
  load(0);
  ptx::cp_async_commit();
  if (num_steps > 1) load(1);
  ptx::cp_async_commit();
  std::int32_t left = column_steps;  // of the column tile
  std::int32_t column_tile = tile.first_tile;
#pragma unroll 1
  for (std::int32_t n = 0; n < num_steps; ++n) {
    ptx::cp_async_wait<1>();
    __syncthreads();  // stage n landed for everyone, and everyone is done with stage n - 1
    if (n + 2 < num_steps) load(n + 2);
    ptx::cp_async_commit();
    asm volatile("" : "+r"(thread));  // opaque: what is derived from it would take registers from stage to stage
    const std::int32_t warp = thread / 32;
    {
      const std::uint32_t stage = ring + static_cast<std::uint32_t>(n % kStages * kStageBytes);
      std::uint32_t q[2][kDepth / 16][4];
      load_fragments<kDepth, 2>(q, stage, warp / 2 * 32, lane());
      multiply_stage<kType, kDepth, 2>(
          s, q, stage + kPartBytes + static_cast<std::uint32_t>(warp % 2 * kStageColumns * kDepth * 2), lane());
    }
    if (--left > 0) continue;
    left = column_steps;

    const std::int32_t first_column =
        column_tile * kColumns + warp % 2 * kStageColumns + lane() % 4 * kLaneColumns;  // of this thread
    ++column_tile;
#pragma unroll
    for (std::int32_t b = 0; b < 2; ++b) {
#pragma unroll
      for (std::int32_t h = 0; h < 2; ++h) {
        const TileRow& row = tile_rows[warp / 2 * 32 + 16 * b + 8 * h + lane() / 4];
        const std::int32_t visible = row.visible - first_column;
        float z[kLaneColumns];
#pragma unroll
        for (std::int32_t k = 0; k < kLaneColumns; ++k) {
          float& score = s[b][fragment_index(k, h)];
          z[k] = score * row.scale;
          score = 0.0f;
        }
        if (visible <= kLaneColumns) {
          const std::int32_t own = (row.position >> args.stride_log2) - first_column;
#pragma unroll
          for (std::int32_t k = 0; k < kLaneColumns; ++k) {
            if (k == own) z[k] *= row.own_factor;
            if (k >= visible) z[k] = -INFINITY;
          }
        }
        const std::int64_t part = first_column >> args.part_columns_log2;
        const std::int64_t room = row.part < 0 ? 0 : args.part_stride - part;
        float* to = args.parts + row.part + part;
        switch (args.part_columns_log2) {
          case 0: store_parts<16>(z, to, room); break;
          case 1: store_parts<8>(z, to, room); break;
          case 2: store_parts<4>(z, to, room); break;
          case 3: store_parts<2>(z, to, room); break;
          case 4: store_parts<1>(z, to, room); break;
          default: {  // two or four threads
            float largest = z[0];
#pragma unroll
            for (std::int32_t k = 1; k < kLaneColumns; ++k) largest = fmaxf(largest, z[k]);
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
            if (args.part_columns_log2 == 6) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
            const float shift = largest == -INFINITY ? 0.0f : largest;
            float sum = 0.0f;
#pragma unroll
            for (const float score : z) sum += ptx::fast_exp2(score - shift);
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            if (args.part_columns_log2 == 6) sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const bool writes = lane() % (args.part_columns_log2 == 6 ? 4 : 2) == 0;
            if (writes && room > 0) *to = shift + ptx::fast_log2(sum);
          }
        }
      }
    }
  }
  ptx::cp_async_wait<0>();
}

__global__ void __launch_bounds__(kSumThreads, 2) xattention_sums_kernel(const __grid_constant__ XAttentionArgs args) {
  __shared__ float row_sums[kRows];  // log2 of the row's sum; +inf: the row does not count
  __shared__ std::int32_t num_bad_rows;
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const std::int32_t block_idx = static_cast<std::int32_t>(blockIdx.x) / args.rows.mask_heads;
  const std::int32_t head = static_cast<std::int32_t>(blockIdx.x) - block_idx * args.rows.mask_heads;
  if (block_idx >= args.step.tables.header->num_blocks) return;
  const QueryBlock block = args.step.tables.blocks[block_idx];
  const StepChunk chunk = args.step.tables.chunks[block.chunk];
  if (block.tokens == 0 || !has_choice(chunk, 1 << args.page_tokens_log2)) return;
  const std::int64_t score_row = std::int64_t{head} * args.rows.max_blocks + block_idx;
  const float* parts = args.parts + score_row * args.block_rows * args.part_stride;
  const std::int32_t first_i = block.first_position / args.block_tokens * args.block_rows;
  const auto num_parts = [&](std::int32_t row) {
    const std::int32_t visible = strided_row(chunk, first_i + row, 1 << args.stride_log2).visible;
    return (visible + (1 << args.part_columns_log2) - 1) >> args.part_columns_log2;
  };

  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  const std::int32_t lane = thread % 32;
  if (thread == 0) num_bad_rows = 0;
  __syncthreads();
#pragma unroll 1
  for (std::int32_t row = thread / 32; row < args.block_rows; row += kSumThreads / 32) {
    const float* from = parts + row * args.part_stride;
    const std::int32_t count = num_parts(row);
    float largest = -INFINITY, sum = 0.0f;
    for (std::int32_t part = lane; part < count; part += 32) largest = fmaxf(largest, from[part]);
#pragma unroll
    for (std::int32_t offset = 16; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    }
    const float shift = largest == -INFINITY ? 0.0f : largest;
    for (std::int32_t part = lane; part < count; part += 32) sum += ptx::fast_exp2(from[part] - shift);
#pragma unroll
    for (std::int32_t offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) {
      row_sums[row] = count > 0 ? shift + log2f(sum) : INFINITY;
      if (count > 0 && !(sum > 0.0f && sum < INFINITY)) atomicAdd(&num_bad_rows, 1);
    }
  }
  __syncthreads();
  if (thread == 0) args.rows.nonfinite[score_row] = num_bad_rows;
  if (num_bad_rows > 0) return;

  const std::int32_t last_page = (block.first_position + block.tokens - 1) >> args.page_tokens_log2;
  const std::int32_t page_parts_log2 = args.page_tokens_log2 - args.stride_log2 - args.part_columns_log2;
#pragma unroll 1
  for (std::int32_t page = thread; page <= last_page; page += kSumThreads) {
    float sum = 0.0f;
    for (std::int32_t row = 0; row < args.block_rows; ++row) {
      const std::int32_t end = min((page + 1) << page_parts_log2, num_parts(row));
      for (std::int32_t part = page << page_parts_log2; part < end; ++part) {
        sum += ptx::fast_exp2(parts[row * args.part_stride + part] - row_sums[row]);
      }
    }
    args.rows.scores[score_row * args.rows.row_stride + page] = sum;
  }
}

XAttentionArgs make_args(const ScoreArgs& args, const ScoreRows& rows, const XAttentionOptions& options) {
  XAttentionArgs x{};
  x.step = args.step;
  x.kv = args.kv;
  x.group = args.group;
  x.block_tokens = args.block_tokens;
  x.page_tokens_log2 = log2_exact(args.page_tokens);
  x.stride_log2 = log2_exact(options.stride);
  x.block_rows = args.block_tokens >> x.stride_log2;
  const std::int32_t tile_rows = x.block_rows * args.group;
  x.run_blocks = tile_rows < kRows ? kRows / tile_rows : 1;
  x.row_tiles = tile_rows < kRows ? 1 : (tile_rows + kRows - 1) / kRows;
  const std::int32_t page_columns_log2 = x.page_tokens_log2 - x.stride_log2;
  x.part_columns_log2 = page_columns_log2 < 6 ? page_columns_log2 : 6;
  x.part_stride = rows.row_stride << (page_columns_log2 - x.part_columns_log2);
  x.scale_log2 = args.softmax_scale * std::numbers::log2e_v<float>;
  x.parts = static_cast<float*>(args.scratch);
  x.rows = rows;
  // Enough CTAs for four waves of two an SM, but no fewer than one column tile each.
  const std::int32_t runs = (rows.max_blocks + x.run_blocks - 1) / x.run_blocks;
  const std::int32_t tiles = runs > 0 ? runs * x.row_tiles * args.num_kv_heads : 1;
  const std::int32_t most = (args.max_context_tokens >> x.stride_log2) / kColumns + 1;
  const std::int32_t wanted = (8 * args.num_sms + tiles - 1) / tiles;
  x.splits = std::clamp(wanted, 1, most);
  return x;
}

}  // namespace

std::int64_t xattention_scratch_bytes(const ScoreArgs& args, const ScoreRows& rows, const XAttentionOptions& options) {
  const XAttentionArgs x = make_args(args, rows, options);
  return std::int64_t{rows.mask_heads} * rows.max_blocks * x.block_rows * x.part_stride * 4;
}

cudaError_t launch_xattention_scores(const ScoreArgs& args, const ScoreRows& rows, const XAttentionOptions& options,
                                     cudaStream_t stream) {
  if (args.scratch_bytes < xattention_scratch_bytes(args, rows, options) || args.head_dim % kDepth != 0) {
    return cudaErrorInvalidValue;
  }
  const XAttentionArgs x = make_args(args, rows, options);
  const auto products = args.kv.dtype == DType::kF16 ? xattention_products_kernel<ptx::MmaType::kF16>
                                                     : xattention_products_kernel<ptx::MmaType::kBf16>;
  constexpr std::int32_t kSmemBytes = kStages * kStageBytes;
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(products),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes);
  if (error != cudaSuccess) return error;
  const std::int32_t grid = rows.max_blocks * args.num_kv_heads * x.row_tiles * x.splits;
  error = launch_kernel(products, grid, kThreads, kSmemBytes, args.pdl, stream, x);
  if (error != cudaSuccess) return error;
  return launch_kernel(xattention_sums_kernel, rows.max_blocks * rows.mask_heads, kSumThreads, 0, args.pdl, stream, x);
}

}  // namespace compact
