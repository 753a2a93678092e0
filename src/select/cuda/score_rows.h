// Rows of scores on the device: what score kernels write (scores.h) and budgets read (choose_rows.h). No CUDA types.
#pragma once

#include <cstdint>

namespace compact {

// One row per (mask head, query block), row head * max_blocks + block.
struct ScoreRows {
  std::int32_t mask_heads = 0;  // Hq or Hkv, as the selector's mask on the CPU
  std::int32_t max_blocks = 0;
  std::int64_t row_stride = 0;  // floats; a multiple of 4, at least the pages of the longest context
  float* scores = nullptr;      // [mask_heads, max_blocks, row_stride]  pages [0, Np); xattention: up to the diagonal,
                                // page floor(p_last / P) included. What follows may hold anything
  float* elsewhere = nullptr;   // [mask_heads, max_blocks]  ScoreRow::elsewhere (budget.h): the chunk's pages together.
                                // Written by oracle, mean-key, sub-mean and seer
  std::int32_t* scored_pages = nullptr;  // [mask_heads, max_blocks]  n of lift / n: pages that take part, those of the
                                         // chunk included. Written by mean-key and sub-mean
  std::int32_t* nonfinite = nullptr;     // [mask_heads, max_blocks]  query rows with a NaN or +inf score, or with -inf
                                         // only, counted as on the CPU. Above 0: all past pages, scores mean nothing
};

}  // namespace compact
