// Warp matrix instruction of sm_80 and later. Lane layout, with g = lane / 4 and t = lane % 4:
//   A 16x16   a[0] row g, columns 2t..2t+1   a[1] row g + 8   a[2] columns + 8   a[3] row + 8, columns + 8
//   B 16x8    b0 rows 2t..2t+1, column g     b1 rows + 8
//   C 16x8    c[0..1] row g, columns 2t..2t+1    c[2..3] row g + 8
#pragma once

#include <cstdint>

#include "src/ptx/convert.cuh"

namespace compact::ptx {

// c += a b
template <MmaType kType>
__device__ __forceinline__ void mma_m16n8k16(float* c, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1) {
  if constexpr (kType == MmaType::kF16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace compact::ptx
