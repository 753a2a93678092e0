/// What the SIMD passes of TileSoftmax read and write: plain pointers into one thread's scratch.
#pragma once

#include <cstdint>
#include <limits>

namespace compact {

inline constexpr std::int32_t kRowGroup = 16;    // rows are padded to this: the longest vector
inline constexpr std::int32_t kColumnBlock = 6;  // columns of a register block; pointers are padded to this
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kLowest = std::numeric_limits<float>::lowest();

/// Buffers are aligned to a vector unless said otherwise.
struct ColumnBatch {
  std::int32_t depth = 0;                 // dimensions of a dot product
  std::int32_t num_columns = 0;           // the panel has room for them rounded up to kColumnBlock
  std::int32_t group_columns = 0;         // the last group may be short
  std::int32_t padded_rows = 0;           // rows rounded up to kRowGroup
  std::int32_t min_visible = 0;           // columns that every row sees
  const float* const* columns = nullptr;  // [num_columns rounded up]  [depth] each, any alignment
  const float* queries = nullptr;         // [depth, padded_rows]
  const float* visible = nullptr;         // [padded_rows]  columns that the row sees
  float* panel = nullptr;                 // [num_columns rounded up, padded_rows]  scores
  float* row_max = nullptr;               // [padded_rows]  running
  float* row_bad = nullptr;               // [padded_rows]  running
  float* shift = nullptr;                 // [padded_rows]  out: subtracted before 2^x
  float* sums = nullptr;                  // [groups, padded_rows]  out
};

/// Groups of one batch and what their sums are multiplied with.
struct RowJoin {
  std::int32_t num_groups = 0;
  std::int32_t padded_rows = 0;
  const float* sums = nullptr;    // [groups, padded_rows]
  const float* factor = nullptr;  // [padded_rows]
  const float* weight = nullptr;  // [padded_rows]  any alignment
  float cap = kInfinity;
};

}  // namespace compact
