// The plan of one attention call: from units to a sorted work list, the list of partial slots, and the counters that
// the main kernel draws from. One algorithm for the device and for the tests; `Block` supplies the parallel parts:
//   index                this thread's place, for single writes
//   for_each(n, f)       f(i) for 0 <= i < n, then a barrier
//   sum(n, f)            sum of f(i), 64 bits
//   scan(a, n, f)        a[i] = f(0) + ... + f(i-1), returns the sum of all f; above 2^30 any larger number may come
//   stable_sort(n, key, emit)   emit(i, position) for every i with key(i) >= 0, ascending keys, equal keys in order of
//                        i; returns how many there are. Called twice per element: key must not change.
// Every call is made by all threads and ends with a barrier.
#pragma once

#include "compact/attention_cuda.h"
#include "src/attention/schedule.h"

namespace compact {

// What the main kernel needs to start, at the head of the workspace. All zero-length work is in it as items too.
struct WorkHeader {
  std::int32_t num_items = 0;
  std::int32_t next_item = 0;  // first index that nobody owns: workers take item [worker], then fetch_add(next_item)
  std::int32_t num_slots = 0;
  std::int32_t cap = 0;  // for reports and tests
};

// One partial slot. The pieces of an M-tile have consecutive slots; the share of rows that a slot's combine step
// writes is [piece, piece + 1) / num_pieces of the tile, so every slot costs the same.
struct SlotItem {
  std::int32_t first_slot = 0;
  std::int32_t num_pieces = 0;
  std::int32_t piece = 0;
  std::int32_t q_row = 0;
  std::int32_t q_rows_valid = 0;
  std::int32_t q_head = 0;
  std::int32_t reserved[2] = {0, 0};
};
static_assert(sizeof(SlotItem) == 32);

struct PrepareArgs {
  Schedule schedule;
  const AttentionUnit* units = nullptr;     // [max_units]
  const std::int32_t* num_units = nullptr;  // null: max_units
  std::int32_t max_units = 0;
  std::int32_t max_m_tiles = 0;
  std::int32_t max_slots = 0;
  WorkHeader* header = nullptr;
  WorkItem* items = nullptr;           // [max_m_tiles + max_slots]
  SlotItem* slots = nullptr;           // [max_slots]
  std::int32_t* m_begin = nullptr;     // scratch [max_units + 1]    first M-tile of each unit
  std::int32_t* step_begin = nullptr;  // scratch [max_units + 1]    first enumeration step of each unit
  std::int32_t* slot_begin = nullptr;  // scratch [max_m_tiles]      first slot of each M-tile
  std::int32_t* tiles = nullptr;       // scratch [max_m_tiles]      KV tiles of each M-tile
  std::int32_t* error = nullptr;       // or null; the first error wins
  bool checked = false;                // the lists were checked before: no work if *error says that they are wrong
};

// The unit that owns index i, given the first index of each; units without any index are skipped.
CA_HOST_DEVICE_CALL inline std::int32_t find_owner(const std::int32_t* begin, std::int32_t count, std::int32_t i) {
  std::int32_t low = 0, high = count;  // the last u with begin[u] <= i lies in [low, high)
  CA_DEVICE_NO_UNROLL
  while (high - low > 1) {
    const std::int32_t middle = low + (high - low) / 2;
    if (begin[middle] <= i) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class Block>
CA_HOST_DEVICE void give_up(Block& block, const PrepareArgs& args, CudaAttentionError error) {
  if (block.index() != 0) return;
  *args.header = WorkHeader{};  // no items, no slots: nothing is computed
  block.report(args.error, static_cast<std::int32_t>(error));
}

template <class Block>
CA_HOST_DEVICE void prepare_work(Block& block, const PrepareArgs& args) {
  const Schedule& s = args.schedule;
  if (args.checked && *args.error != 0) return give_up(block, args, CudaAttentionError::kNone);
  const std::int32_t num_units = args.num_units == nullptr ? args.max_units : *args.num_units;
  if (num_units < 0 || num_units > args.max_units) return give_up(block, args, CudaAttentionError::kTooManyUnits);

  const std::int64_t num_m =
      block.scan(args.m_begin, num_units, [&](std::int32_t u) { return num_m_tiles(s, args.units[u]); });
  if (num_m > args.max_m_tiles) return give_up(block, args, CudaAttentionError::kTooManyMTiles);
  const auto total_m = static_cast<std::int32_t>(num_m);

  // M-tile f of the batch: units in order, M-tiles of a unit descending.
  const auto m_tiles_of = [&](std::int32_t u) {
    return (u + 1 < num_units ? args.m_begin[u + 1] : total_m) - args.m_begin[u];
  };
  const auto m_tile_at = [&](std::int32_t f, std::int32_t u) {
    return whole_m_tile(s, args.units[u], u, m_tiles_of(u) - 1 - (f - args.m_begin[u]));
  };
  const std::int64_t total_tiles = block.sum(total_m, [&](std::int32_t f) {
    args.tiles[f] = tile_count(m_tile_at(f, find_owner(args.m_begin, num_units, f)));
    return args.tiles[f];
  });
  const std::int32_t cap = cap_tiles(total_tiles, total_m, s.num_workers);
  const std::int64_t num_slots = block.scan(args.slot_begin, total_m, [&](std::int32_t f) {
    const std::int32_t pieces = num_pieces(s, cap, args.tiles[f]);
    return pieces > 1 ? pieces : 0;
  });
  if (num_slots > args.max_slots) return give_up(block, args, CudaAttentionError::kTooManySlots);

  // Steps enumerate (unit, piece, M-tile descending): tiles of a head stay side by side within a class and read the
  // same pages at the same time. The last M-tile has the most pieces; steps of pieces that the others lack are holes.
  // If nothing is cut, steps are M-tiles.
  const bool cut = num_slots > 0;
  std::int32_t num_steps = total_m;
  if (cut) {
    num_steps = static_cast<std::int32_t>(block.scan(args.step_begin, num_units, [&](std::int32_t u) {
      const std::int32_t m_tiles = m_tiles_of(u);
      return m_tiles == 0 ? 0 : m_tiles * num_pieces(s, cap, args.tiles[args.m_begin[u]]);
    }));
  }
  struct Step {
    std::int32_t unit, m_tile, piece;  // m_tile: of the batch, f
  };
  const auto cut_step = [&](std::int32_t step) {
    const std::int32_t u = find_owner(args.step_begin, num_units, step);
    const std::int32_t m_tiles = m_tiles_of(u), in_unit = step - args.step_begin[u];
    const std::int32_t piece = divide(in_unit, m_tiles);
    return Step{u, args.m_begin[u] + in_unit - piece * m_tiles, piece};
  };
  const auto key = [&](std::int32_t step) {
    const Step at = cut ? cut_step(step) : Step{0, step, 0};
    const std::int32_t n = args.tiles[at.m_tile], pieces = cut ? num_pieces(s, cap, n) : 1;
    return at.piece < pieces ? kNumLengthClasses - 1 - length_class(n, pieces) : -1;
  };
  const auto emit = [&](std::int32_t step, std::int32_t position) {
    const Step at = cut ? cut_step(step) : Step{find_owner(args.m_begin, num_units, step), step, 0};
    WorkItem item = m_tile_at(at.m_tile, at.unit);
    const std::int32_t n = tile_count(item), pieces = cut ? num_pieces(s, cap, n) : 1;
    if (pieces > 1) {
      item.tile_begin = piece_begin(s, n, pieces, at.piece);
      item.tile_end = piece_begin(s, n, pieces, at.piece + 1);
      const std::int32_t first_slot = args.slot_begin[at.m_tile];
      item.partial_slot = first_slot + at.piece;
      args.slots[item.partial_slot] = {first_slot,        pieces,      at.piece, item.q_row,
                                       item.q_rows_valid, item.q_head, {0, 0}};
    }
    args.items[position] = item;
  };
  const std::int32_t num_items = block.stable_sort(num_steps, key, emit);
  if (block.index() == 0) {
    *args.header = {num_items, s.num_workers, static_cast<std::int32_t>(num_slots), cap};
  }
}

}  // namespace compact
