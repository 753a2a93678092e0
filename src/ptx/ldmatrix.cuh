// ldmatrix: 8x8 matrices of 16-bit elements from shared memory into fragments.
#pragma once

#include <cstdint>

namespace compact::ptx {

// Lanes 8i .. 8i+7 give the row addresses of matrix i; its row r goes to lanes 4r .. 4r+3 of fragment[i].
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t* fragment, std::uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row_address)
               : "memory");
}

}  // namespace compact::ptx
