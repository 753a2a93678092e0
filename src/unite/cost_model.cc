// What a unit costs (docs/design/method.md 5.3). Pure integer arithmetic.
#include "src/unite/cost_model.h"

#include "compact/block_union.h"

namespace compact {

std::int64_t unit_cost(const CostModel& cost, std::int32_t q_len, std::int32_t heads_per_unit, std::int32_t list_pages,
                       std::int32_t page_tokens) noexcept {
  return cost_of_unit(cost, q_len, heads_per_unit, list_pages, page_tokens);
}

}  // namespace compact
