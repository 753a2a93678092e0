/// What the SIMD passes of the mean-key rule read and write: plain pointers into one thread's scratch.
#pragma once

#include <cstdint>
#include <limits>

namespace compact {

inline constexpr std::int32_t kRowGroup = 16;  // rows are padded to this: the longest vector
inline constexpr std::int32_t kPageBlock = 6;  // pages of a register block; means are padded to this
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// All buffers are aligned to a vector; padded_pages = num_pages rounded up to kPageBlock.
struct TileJob {
  std::int32_t head_dim = 0;            // D
  std::int32_t num_pages = 0;           // scored pages
  std::int32_t padded_rows = 0;         // rows rounded up to kRowGroup
  std::int32_t min_visible = 0;         // pages that every row sees
  const float* const* means = nullptr;  // [padded_pages]  mean key [D] of each; the last one repeated
  const float* queries = nullptr;       // [D, padded_rows]  times s * log2(e)
  const float* visible = nullptr;       // [padded_rows]  pages that the row sees; 0 for padding
  float* panel = nullptr;               // [padded_pages, padded_rows]  scores, then exponentials
  float* row_max = nullptr;             // [padded_rows]  over visible pages; in: -inf
  float* row_bad = nullptr;             // [padded_rows]  > 0 if a visible score is NaN or +inf; in: 0
  const float* shift = nullptr;         // [padded_rows]  subtracted before 2^x
  float* row_sum = nullptr;             // [padded_rows]  sum of exponentials
  const float* weight = nullptr;        // [padded_rows]  0 for rows that do not vote
  float* energy = nullptr;              // [num_pages]    E
};

}  // namespace compact
