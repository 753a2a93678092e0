// Columns of a score kernel, 64 to a stage, and sums over those of a page.
//
// A column is a row of D 16-bit numbers in memory: a key, or the mean of a granule. Columns of a request are numbered
// in order of position and gathered through its page table. A page has a power of two of them.
//
// Order within a stage: the products of an m16n8k16 leave lane l with columns 2t and 2t+1 (t = l % 4) of each block of
// eight. The gather puts the columns 16t .. 16t+15 of the stage there, so that a thread has whole pages of up to 16
// columns, and sums over a page need no shuffle. In the thread's fragment column 16t + k of row h is number
// `fragment_index(k, h)`.
#pragma once

#include <cstdint>

#include "src/ptx/cp_async.cuh"
#include "src/ptx/ldmatrix.cuh"
#include "src/ptx/mma_sync.cuh"

namespace compact {

constexpr std::int32_t kStageColumns = 64;
constexpr std::int32_t kLaneColumns = 16;  // of a stage, in one thread

struct ScoreColumns {
  const std::uint16_t* data = nullptr;
  std::int64_t page_stride = 0;  // elements
  std::int64_t head_stride = 0;
  std::int64_t column_stride = 0;
  std::int32_t page_columns_log2 = 0;
};

// The place of the stage's column in shared memory, inverted: which column stands in row `row` of the stage.
__device__ __forceinline__ constexpr std::int32_t column_of_row(std::int32_t row) {
  return row % 8 / 2 * kLaneColumns + row / 8 * 2 + row % 2;
}
__device__ __forceinline__ constexpr std::int32_t fragment_index(std::int32_t k, std::int32_t h) {
  return k / 2 * 4 + 2 * h + k % 2;
}

// Starts the copy of the columns [first, first + 64) of a KV head; those from `end` on become zeros.
template <std::int32_t kHeadDim, std::int32_t kThreads>
__device__ __forceinline__ void load_columns(std::uint32_t shared, const ScoreColumns& columns,
                                             const std::int32_t* table, std::int32_t kv_head, std::int32_t first,
                                             std::int32_t end) {
  constexpr std::int32_t kPieces = kHeadDim / 8;
  constexpr std::int32_t kRowsPerPass = kThreads / kPieces;
  constexpr std::int32_t kPasses = kStageColumns / kRowsPerPass;
  std::int32_t thread = static_cast<std::int32_t>(threadIdx.x);
  asm volatile("" : "+r"(thread), "+r"(first));  // opaque: nothing derived from it is kept from stage to stage
  const std::int32_t piece = thread % kPieces;
  const std::int32_t first_row = thread / kPieces;
  const std::uint16_t* data = columns.data + kv_head * columns.head_stride + piece * 8;
  constexpr std::int32_t kGroup = 4;  // ids of a group first: one wait for the table instead of one per row
  static_assert(kPasses % kGroup == 0, "groups fill the passes evenly");
#pragma unroll
  for (std::int32_t group = 0; group < kPasses; group += kGroup) {
    std::int32_t page[kGroup];
#pragma unroll
    for (std::int32_t i = 0; i < kGroup; ++i) {
      const std::int32_t c = first + column_of_row(first_row + (group + i) * kRowsPerPass);
      page[i] = c < end ? table[c >> columns.page_columns_log2] : -1;
    }
#pragma unroll
    for (std::int32_t i = 0; i < kGroup; ++i) {
      const std::int32_t row = first_row + (group + i) * kRowsPerPass;
      const std::int32_t in_page = (first + column_of_row(row)) & ((1 << columns.page_columns_log2) - 1);
      const bool valid = page[i] >= 0;
      const std::int64_t from = valid ? page[i] * columns.page_stride + in_page * columns.column_stride : 0;
      ptx::cp_async_16(shared + ptx::swizzled_piece_offset<kHeadDim>(row, piece), data + from, valid);
    }
  }
}

// s += rows of 16-bit queries times the columns of a stage. q: A fragments of kRowBlocks x 16 rows; s: fragments of
// kRowBlocks x (16 rows x 64 columns).
template <ptx::MmaType kType, std::int32_t kHeadDim, std::int32_t kRowBlocks>
__device__ __forceinline__ void multiply_stage(float (&s)[kRowBlocks][kStageColumns / 2],
                                               const std::uint32_t (&q)[kRowBlocks][kHeadDim / 16][4],
                                               std::uint32_t stage, std::int32_t lane) {
  const std::uint32_t lane_stage = stage + ptx::swizzled_piece_offset<kHeadDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (std::int32_t step = 0; step < kHeadDim / 16; ++step) {
#pragma unroll
    for (std::int32_t j = 0; j < kStageColumns / 8; j += 2) {
      std::uint32_t columns[4];  // rows 8j..8j+7 of the stage and the eight after them
      ptx::ldmatrix_x4(columns, (lane_stage ^ static_cast<std::uint32_t>(step * 32)) +
                                    static_cast<std::uint32_t>(j * 8 * kHeadDim * 2));
#pragma unroll
      for (std::int32_t b = 0; b < kRowBlocks; ++b) {
        ptx::mma_m16n8k16<kType>(&s[b][4 * j], q[b][step], columns[0], columns[1]);
        ptx::mma_m16n8k16<kType>(&s[b][4 * j + 4], q[b][step], columns[2], columns[3]);
      }
    }
  }
}

// A fragments of the rows [first_row, first_row + 16 kRowBlocks) of a tile in shared memory.
template <std::int32_t kHeadDim, std::int32_t kRowBlocks>
__device__ __forceinline__ void load_fragments(std::uint32_t (&q)[kRowBlocks][kHeadDim / 16][4], std::uint32_t shared,
                                               std::int32_t first_row, std::int32_t lane) {
#pragma unroll
  for (std::int32_t b = 0; b < kRowBlocks; ++b) {
    const std::uint32_t lane_q =
        shared + ptx::swizzled_piece_offset<kHeadDim>(first_row + b * 16 + lane % 16, lane / 16);
#pragma unroll
    for (std::int32_t step = 0; step < kHeadDim / 16; ++step) {
      ptx::ldmatrix_x4(q[b][step], lane_q ^ static_cast<std::uint32_t>(step * 32));
    }
  }
}

// Starts the copy of packed query rows: row r is token r / heads, head first_head + r % heads. Rows from `rows` on
// become zeros.
template <std::int32_t kHeadDim, std::int32_t kRows, std::int32_t kThreads>
__device__ __forceinline__ void load_packed_queries(std::uint32_t shared, const std::uint16_t* q,
                                                    std::int64_t token_stride, std::int64_t head_stride,
                                                    std::int32_t first_token, std::int32_t first_head,
                                                    std::int32_t heads, std::int32_t rows) {
  constexpr std::int32_t kPieces = kHeadDim / 8;
  const std::int32_t piece = static_cast<std::int32_t>(threadIdx.x) % kPieces;
  for (std::int32_t row = static_cast<std::int32_t>(threadIdx.x) / kPieces; row < kRows; row += kThreads / kPieces) {
    const bool valid = row < rows;
    const std::int32_t token = row / heads;
    const std::int32_t head = first_head + row - token * heads;
    const std::int64_t from = valid ? (first_token + token) * token_stride + head * head_stride : 0;
    ptx::cp_async_16(shared + ptx::swizzled_piece_offset<kHeadDim>(row, piece), q + from + piece * 8, valid);
  }
}

// Joins values of the eight lanes that have the same columns (l % 4): each hands half of them to its partner while
// there are several. Lane l ends with the values joined_first(l) and on, max(1, kValues / 8) of them, in front.
template <std::int32_t kOffset, std::int32_t kValues, class Join>
__device__ __forceinline__ void join_lanes_from(float* values, std::int32_t lane, Join join) {
  if constexpr (kOffset >= 4) {
    constexpr std::int32_t kKept = kValues > 1 ? kValues / 2 : 1;
    const bool upper = (lane & kOffset) != 0;
#pragma unroll
    for (std::int32_t i = 0; i < kKept; ++i) {
      const float other = kValues > 1 ? values[i + kValues / 2] : values[i];
      const float sent = kValues > 1 && upper ? values[i] : other;
      const float kept = kValues > 1 && upper ? other : values[i];
      values[i] = join(kept, __shfl_xor_sync(0xffffffffu, sent, kOffset));
    }
    join_lanes_from<kOffset / 2, kKept>(values, lane, join);
  }
}
template <std::int32_t kValues, class Join>
__device__ __forceinline__ void join_lanes(float (&values)[kValues], std::int32_t lane, Join join) {
  join_lanes_from<16, kValues>(values, lane, join);
}
template <std::int32_t kValues>
__device__ __forceinline__ std::int32_t joined_first(std::int32_t lane) {
  std::int32_t first = 0, count = kValues;
#pragma unroll
  for (std::int32_t offset = 16; offset >= 4 && count > 1; offset /= 2) {
    count /= 2;
    if ((lane & offset) != 0) first += count;
  }
  return first;
}

}  // namespace compact
