// Where everything lies in the workspace of one call. Computed from host numbers alone.
#pragma once

#include <cstdint>

#include "src/attention/prepare.h"

namespace compact {

struct Workspace {
  std::int64_t header = 0;       // byte offsets
  std::int64_t items = 0;        // WorkItem [max_items]
  std::int64_t slots = 0;        // SlotItem [max_slots]
  std::int64_t m_begin = 0;      // int32 [max_units + 1]
  std::int64_t step_begin = 0;   // int32 [max_units + 1]
  std::int64_t slot_begin = 0;   // int32 [max_m_tiles]
  std::int64_t tiles = 0;        // int32 [max_m_tiles]
  std::int64_t partial_m_l = 0;  // float [max_slots, BM, 2]
  std::int64_t partial_o = 0;    // float [max_slots, BM, D]
  std::int64_t bytes = 0;
};

inline Workspace plan_workspace(std::int64_t max_units, std::int64_t max_m_tiles, std::int64_t max_slots,
                                std::int64_t tile_rows, std::int64_t head_dim) {
  constexpr std::int64_t kAlignment = 256;
  Workspace at;
  const auto take = [&](std::int64_t bytes) {
    const std::int64_t offset = at.bytes;
    at.bytes += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  };
  at.header = take(sizeof(WorkHeader));
  at.items = take((max_m_tiles + max_slots) * std::int64_t{sizeof(WorkItem)});
  at.slots = take(max_slots * std::int64_t{sizeof(SlotItem)});
  at.m_begin = take((max_units + 1) * std::int64_t{sizeof(std::int32_t)});
  at.step_begin = take((max_units + 1) * std::int64_t{sizeof(std::int32_t)});
  at.slot_begin = take(max_m_tiles * std::int64_t{sizeof(std::int32_t)});
  at.tiles = take(max_m_tiles * std::int64_t{sizeof(std::int32_t)});
  at.partial_m_l = take(max_slots * tile_rows * 2 * std::int64_t{sizeof(float)});
  at.partial_o = take(max_slots * tile_rows * head_dim * std::int64_t{sizeof(float)});
  return at;
}

}  // namespace compact
