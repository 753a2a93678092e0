/// One row of a merge of partial results (docs/design/method.md 6.3).
#pragma once

#include <cstdint>
#include <span>

namespace compact {

struct PartialRow {
  const float* o = nullptr;  // [D]; not read if lse is -inf
  float lse = 0;
};

/// Writes the merged row to o and returns its LSE. Parts are added in the order given; o may be the first part's.
float merge_row(std::span<const PartialRow> parts, std::int32_t head_dim, float* o);

}  // namespace compact
