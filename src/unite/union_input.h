/// Checks of the union's input, and the shape that follows from it.
#pragma once

#include <cstdint>

#include "compact/block_union.h"

namespace compact {

struct UnionShape {
  std::int32_t group = 1;  // G
  std::int32_t heads_per_unit = 1;
  bool cheapest_heads = false;  // heads_per_unit is G until the cheapest divisor is known
};

/// Heads, options, chunks and page tables. kInvalidArgument says what was wrong.
[[nodiscard]] Result<UnionShape> check_union_input(const UnionInput& input);

/// The mask's blocks must cover every chunk exactly, in order, and name past pages only.
[[nodiscard]] Status check_mask(const UnionInput& input, const BlockMask& mask);

}  // namespace compact
