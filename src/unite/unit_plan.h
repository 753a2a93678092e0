/// Second stage of the union: which neighbouring spans become one unit.
#pragma once

#include <cstdint>
#include <vector>

#include "src/unite/span_unions.h"

namespace compact {

/// Neighbouring spans of one plan and sub-group that share a list.
struct PlannedUnit {
  std::int64_t first_union = 0;  // in SpanUnions: [first_union, end_union)
  std::int64_t end_union = 0;
};

struct UnitPlan {
  SpanUnions unions;
  std::vector<PlannedUnit> units;
};

/// Every span alone, or, in mode adaptive, merged by cost, with the heads per unit that options.heads_per_unit asks
/// for.
[[nodiscard]] UnitPlan plan_units(const UnionInput& input, const BlockMask& mask, UnionShape shape, ThreadPool& pool);

}  // namespace compact
