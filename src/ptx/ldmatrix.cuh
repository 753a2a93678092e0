// ldmatrix: four 8x8 matrices of 16-bit elements from shared memory into fragments. Lane l gives the address of row l %
// 8 of matrix l / 8 (16 bytes).
#pragma once

#include <cstdint>

namespace compact::ptx {

// Byte offset of 16-byte piece `piece` of row `row` in a tile with rows of kColumns 16-bit elements, 64 or more: piece
// j lies at j ^ (row & 7), so that eight rows of one piece touch all banks once. The piece of an even number more, at
// the same row, lies at offset ^ (16 * number): what fragment loops use.
template <std::int32_t kColumns>
__device__ constexpr std::uint32_t swizzled_piece_offset(std::int32_t row, std::int32_t piece) {
  return static_cast<std::uint32_t>(row * kColumns * 2 + ((piece ^ (row & 7)) * 16));
}

// fragment[i] of lane l: elements 2 (l % 4) and the next of row l / 4 of matrix i.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t* fragment, std::uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row_address)
               : "memory");
}

// The same with every matrix transposed: rows 2 (l % 4) and the next of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t* fragment, std::uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row_address)
               : "memory");
}

}  // namespace compact::ptx
