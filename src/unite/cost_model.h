/// The cost model's formula for host and device (docs/design/method.md 5.3): integers, so that both form the same
/// units.
#pragma once

#include <cstdint>

#include "compact/block_union.h"
#include "src/core/host_device.h"
#include "src/unite/spans.h"

namespace compact {

/// cost = M (n t_tile + t_m) + n t_list + t_unit, n = list tokens / 128.
CA_HOST_DEVICE constexpr std::int64_t cost_of_unit(const CostModel& cost, std::int32_t q_len,
                                                   std::int32_t heads_per_unit, std::int32_t list_pages,
                                                   std::int32_t page_tokens) noexcept {
  if (q_len <= 0) return 0;
  const std::int32_t tokens_per_tile = tile_span_tokens(heads_per_unit);
  const std::int32_t heads_per_tile = heads_per_unit & -heads_per_unit;
  const std::int64_t m_tiles =
      std::int64_t{heads_per_unit / heads_per_tile} * (q_len / tokens_per_tile + (q_len % tokens_per_tile != 0));
  const std::int64_t list_tokens = std::int64_t{list_pages} * page_tokens;
  return m_tiles * (list_tokens * cost.tile / kTileRows + cost.m_tile) + list_tokens * cost.list_tile / kTileRows +
         cost.unit;
}

}  // namespace compact
