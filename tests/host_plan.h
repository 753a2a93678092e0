/// The work plan of src/attention/prepare.h on the host, one thread, for tests.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "src/attention/prepare.h"

namespace compact::testing {

class HostBlock {
 public:
  std::int32_t index() const { return 0; }
  void report(std::int32_t* error, std::int32_t code) const {
    if (error != nullptr && *error == 0) *error = code;
  }
  template <class F>
  void for_each(std::int32_t n, F f) {
    for (std::int32_t i = 0; i < n; ++i) f(i);
  }
  template <class F>
  std::int64_t sum(std::int32_t n, F f) {
    std::int64_t total = 0;
    for (std::int32_t i = 0; i < n; ++i) total += f(i);
    return total;
  }
  template <class F>
  std::int64_t scan(std::int32_t* a, std::int32_t n, F f) {
    std::int64_t total = 0;
    for (std::int32_t i = 0; i < n; ++i) {
      const std::int32_t value = f(i);
      a[i] = static_cast<std::int32_t>(total);
      total += value;
    }
    return total;
  }
  template <class Key, class Emit>
  std::int32_t stable_sort(std::int32_t n, Key key, Emit emit) {
    std::vector<std::int32_t> order;
    std::vector<std::int32_t> keys;
    for (std::int32_t i = 0; i < n; ++i) {
      keys.push_back(key(i));
      if (keys.back() >= 0) order.push_back(i);
    }
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
      return keys[static_cast<std::size_t>(a)] < keys[static_cast<std::size_t>(b)];
    });
    for (std::size_t i = 0; i < order.size(); ++i) emit(order[i], static_cast<std::int32_t>(i));
    return static_cast<std::int32_t>(order.size());
  }
};

struct HostPlan {
  WorkHeader header;
  std::vector<WorkItem> items;
  std::vector<SlotItem> slots;
  std::int32_t error = 0;
};

inline HostPlan host_plan(const Schedule& schedule, const std::vector<AttentionUnit>& units, std::int32_t max_m_tiles,
                          std::int32_t max_slots, std::int32_t found_by_check = 0) {
  HostPlan plan;
  plan.error = found_by_check;
  const auto room = [](std::int32_t n) { return static_cast<std::size_t>(n); };
  plan.items.resize(room(max_m_tiles + max_slots));
  plan.slots.resize(room(max_slots));
  std::vector<std::int32_t> m_begin(units.size() + 1), step_begin(units.size() + 1), slot_begin(room(max_m_tiles)),
      tiles(room(max_m_tiles));
  const PrepareArgs args{.schedule = schedule,
                         .units = units.data(),
                         .max_units = static_cast<std::int32_t>(units.size()),
                         .max_m_tiles = max_m_tiles,
                         .max_slots = max_slots,
                         .header = &plan.header,
                         .items = plan.items.data(),
                         .slots = plan.slots.data(),
                         .m_begin = m_begin.data(),
                         .step_begin = step_begin.data(),
                         .slot_begin = slot_begin.data(),
                         .tiles = tiles.data(),
                         .error = &plan.error,
                         .checked = found_by_check != 0};
  HostBlock block;
  prepare_work(block, args);
  plan.items.resize(room(plan.header.num_items));
  plan.slots.resize(room(plan.header.num_slots));
  return plan;
}

}  // namespace compact::testing
