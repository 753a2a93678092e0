// The work plan of the CUDA kernels, computed on the CPU by the code that runs on the device.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "src/attention/schedule.h"
#include "tests/host_plan.h"

namespace compact {
namespace {

using testing::host_plan;
using testing::HostPlan;

Schedule h200(std::int32_t heads_per_unit = 4) {
  return {.tile_rows = 128,
          .tile_tokens = 128,
          .heads_per_unit = heads_per_unit,
          .heads_per_tile = heads_per_tile(heads_per_unit),
          .num_workers = 132};
}

TEST(AttentionSchedule, HeadsPerTile) {
  const std::pair<int, int> expected[] = {{1, 1}, {2, 2}, {3, 1},  {4, 4},   {6, 2},
                                          {7, 1}, {8, 8}, {12, 4}, {16, 16}, {128, 64}};
  for (const auto& [heads_per_unit, heads] : expected)
    EXPECT_EQ(heads_per_tile(heads_per_unit), heads) << heads_per_unit;
}

// A chunk of 100 tokens after 300 selected past tokens, four heads: 32 tokens per tile; worked by hand.
TEST(AttentionSchedule, MTileWorkedByHand) {
  const AttentionUnit unit{.q_begin = 50,
                           .q_len = 100,
                           .q_head = 8,
                           .kv_head = 2,
                           .list_begin = 7,
                           .list_tokens = 400,
                           .past_tokens = 300,
                           .causal_shift = 0};
  const Schedule s = h200();
  ASSERT_EQ(num_m_tiles(s, unit), 4);
  const WorkItem first = whole_m_tile(s, unit, 3, 0);
  EXPECT_EQ(first.q_row, 50);
  EXPECT_EQ(first.q_rows_valid, 32);
  EXPECT_EQ(first.q_head, 8);
  EXPECT_EQ(first.visible_base, 300);
  EXPECT_EQ(first.tile_end, 3);           // the last query, 31, sees 332 tokens
  EXPECT_EQ(first.first_masked_tile, 2);  // query 0 sees 301 tokens: two whole tiles
  const WorkItem last = whole_m_tile(s, unit, 3, 3);
  EXPECT_EQ(last.q_row, 146);
  EXPECT_EQ(last.q_rows_valid, 4);
  EXPECT_EQ(last.visible_base, 396);
  EXPECT_EQ(last.tile_end, 4);
  EXPECT_EQ(last.first_masked_tile, 3);
  EXPECT_EQ(last.unit, 3);
  EXPECT_EQ(last.m_tile, 3);
}

TEST(AttentionSchedule, SixHeadsMakeThreeSlotsOfTwo) {
  const Schedule s = h200(6);
  const AttentionUnit unit{.q_len = 65, .q_head = 12, .list_tokens = 65};
  ASSERT_EQ(num_m_tiles(s, unit), 6);  // two token tiles of 64, three head slots
  EXPECT_EQ(whole_m_tile(s, unit, 0, 2).q_head, 16);
  EXPECT_EQ(whole_m_tile(s, unit, 0, 3).q_head, 12);
  EXPECT_EQ(whole_m_tile(s, unit, 0, 3).q_row, 64);
  EXPECT_EQ(whole_m_tile(s, unit, 0, 3).q_rows_valid, 1);
}

TEST(AttentionSchedule, PositionsNearTheEndOfInt32DoNotOverflow) {
  const AttentionUnit unit{
      .q_len = 1, .list_tokens = 2147483647, .past_tokens = 2147483000, .causal_shift = 2000000000};
  EXPECT_EQ(whole_m_tile(h200(), unit, 0, 0).tile_end, (2147483647 - 4096 + 1 + 127) / 128);
}

TEST(AttentionSchedule, CapOfManyMTilesIsHalfAShareWithAMargin) {
  constexpr std::int32_t kMany = 4 * 132;
  EXPECT_EQ(cap_tiles(0, kMany, 132), 8);
  EXPECT_EQ(cap_tiles(264 * 100, kMany, 132), 110);
  EXPECT_EQ(cap_tiles(264 * 100 + 1, kMany, 132), 111);
  EXPECT_EQ(cap_tiles(std::int64_t{1} << 40, kMany, 132), 0x7fffffff);
}

TEST(AttentionSchedule, FewMTilesAreCutIntoFullWaves) {
  const Schedule s = h200();
  const auto pieces = [&](std::int32_t m_tiles, std::int32_t length) {
    return num_pieces(s, cap_tiles(std::int64_t{m_tiles} * length, m_tiles, 132), length);
  };
  EXPECT_EQ(cap_tiles(0, 0, 132), 8);
  EXPECT_EQ(pieces(176, 256), 3);  // 528 pieces are four waves of 132; whole they are two, half of the second idle
  EXPECT_EQ(pieces(256, 256), 1);  // two waves, 3 % idle
  EXPECT_EQ(pieces(128, 256), 1);  // one wave
  EXPECT_EQ(pieces(32, 256), 4);   // 128 pieces are one wave
  EXPECT_EQ(pieces(256, 8), 1);    // too short to cut
  EXPECT_EQ(pieces(1, 256), 32);   // no piece below kMinCapTiles
  // Lengths that differ by 12 %, as the causal end of a chunk makes them, are cut alike.
  const std::int32_t cap = cap_tiles(176 * 256, 176, 132);
  EXPECT_EQ(num_pieces(s, cap, 241), 3);
  EXPECT_EQ(num_pieces(s, cap, 271), 3);
}

TEST(AttentionSchedule, CutAboveOneAndAQuarterCaps) {
  const Schedule s = h200();
  EXPECT_EQ(num_pieces(s, 8, 0), 1);
  EXPECT_EQ(num_pieces(s, 8, 10), 1);
  EXPECT_EQ(num_pieces(s, 8, 11), 2);
  EXPECT_EQ(num_pieces(s, 8, 17), 3);
  EXPECT_EQ(piece_begin(s, 17, 3, 1), 6);
  EXPECT_EQ(piece_begin(s, 17, 3, 2), 12);
  EXPECT_EQ(piece_begin(s, 17, 3, 3), 17);
  Schedule fixed = s;
  fixed.fixed_split_tiles = 8;
  EXPECT_EQ(num_pieces(fixed, 1000, 8), 1);
  EXPECT_EQ(num_pieces(fixed, 1000, 17), 3);
  EXPECT_EQ(piece_begin(fixed, 17, 3, 2), 16);
  EXPECT_EQ(piece_begin(fixed, 17, 3, 3), 17);
}

TEST(AttentionSchedule, EightClassesPerOctave) {
  EXPECT_EQ(length_class(0, 1), 0);
  EXPECT_EQ(length_class(1, 1), 0);
  EXPECT_EQ(length_class(2, 1), 8);
  EXPECT_EQ(length_class(3, 1), 12);
  EXPECT_EQ(length_class(256, 1), 64);
  EXPECT_EQ(length_class(287, 1), 64);
  EXPECT_EQ(length_class(288, 1), 65);
  EXPECT_EQ(length_class(575, 2), 65);
  EXPECT_EQ(length_class(2147483647, 1), kNumLengthClasses - 1);
  for (std::int32_t n = 1; n < 100000; ++n) ASSERT_LE(length_class(n - 1, 1), length_class(n, 1)) << n;
}

// 32 M-tiles of one head with 64 tiles each on 132 workers: 2048 tiles, cap 9, so eight pieces each, and the tiles of
// one piece stand together.
TEST(AttentionSchedule, OneHeadIsCutForEveryWorker) {
  const AttentionUnit unit{.q_len = 1024, .list_tokens = 8192, .past_tokens = 8192};
  const HostPlan plan = host_plan(h200(), {unit}, 32, 528);
  EXPECT_EQ(plan.error, 0);
  EXPECT_EQ(plan.header.cap, 18);
  ASSERT_EQ(plan.header.num_items, 32 * 4);  // one wave
  EXPECT_EQ(plan.header.num_slots, 32 * 4);
  EXPECT_EQ(plan.header.next_item, 132);
  for (std::size_t i = 0; i < 128; ++i) {
    EXPECT_EQ(plan.items[i].tile_begin, static_cast<std::int32_t>(i / 32 * 16));
    EXPECT_EQ(plan.items[i].m_tile, static_cast<std::int32_t>(31 - i % 32));
  }
}

TEST(AttentionSchedule, BoundsAreReported) {
  const AttentionUnit unit{.q_len = 1024, .list_tokens = 8192, .past_tokens = 8192};
  HostPlan plan = host_plan(h200(), {unit}, 31, 528);
  EXPECT_EQ(plan.error, static_cast<std::int32_t>(CudaAttentionError::kTooManyMTiles));
  EXPECT_EQ(plan.header.num_items, 0);
  plan = host_plan(h200(), {unit}, 32, 127);
  EXPECT_EQ(plan.error, static_cast<std::int32_t>(CudaAttentionError::kTooManySlots));
  EXPECT_EQ(plan.header.num_items, 0);
}

TEST(AttentionSchedule, NoWorkAfterAFailedCheck) {
  const AttentionUnit unit{.q_len = 1024, .list_tokens = 8192, .past_tokens = 8192};
  const auto bad_unit = static_cast<std::int32_t>(CudaAttentionError::kBadUnit);
  const HostPlan plan = host_plan(h200(), {unit}, 32, 528, bad_unit);
  EXPECT_EQ(plan.error, bad_unit);
  EXPECT_EQ(plan.header.num_items, 0);
  EXPECT_EQ(plan.header.num_slots, 0);
}

struct RandomBatch {
  Schedule schedule;
  std::vector<AttentionUnit> units;
  std::int32_t tokens = 0;
  std::int32_t q_heads = 0;
};

RandomBatch random_batch(std::uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&](std::int32_t n) {
    return static_cast<std::int32_t>(random() % static_cast<std::uint32_t>(n));
  };
  const auto pick = [&](std::initializer_list<std::int32_t> values) {
    return values.begin()[below(static_cast<std::int32_t>(values.size()))];
  };
  RandomBatch batch;
  Schedule& s = batch.schedule;
  s.tile_rows = pick({64, 128, 192});
  s.tile_tokens = pick({64, 128, 192});
  s.heads_per_unit = pick({1, 2, 3, 4, 6, 7, 8, 16});
  s.heads_per_tile = heads_per_tile(s.heads_per_unit);
  s.num_workers = pick({1, 2, 16, 132, 264});
  s.fixed_split_tiles = below(3) == 0 ? pick({1, 2, 8, 100}) : 0;
  const std::int32_t unit_slots = 1 + below(4);  // KV heads times sub-groups
  batch.q_heads = unit_slots * s.heads_per_unit;
  const std::int32_t longest = pick({300, 5000, 200000});
  for (std::int32_t b = below(5); b > 0; --b) {
    const std::int32_t chunk = pick({0, 1, 31, 129, 1 + below(1500)});
    const std::int32_t past = below(longest);
    for (std::int32_t slot = 0; slot < unit_slots; ++slot) {
      for (std::int32_t done = 0; done <= chunk;) {  // a chunk of 0 gives a unit of 0 tokens
        const std::int32_t span = below(3) == 0 ? std::min(chunk - done, 1 + below(200)) : chunk - done;
        AttentionUnit unit{
            .q_begin = batch.tokens + done, .q_len = span, .q_head = slot * s.heads_per_unit, .kv_head = slot};
        unit.past_tokens = below(2) == 0 ? past : below(past + 1);
        unit.list_tokens = below(8) == 0 ? 0 : unit.past_tokens + chunk;
        if (unit.list_tokens == 0) unit.past_tokens = 0;
        unit.causal_shift = done;
        batch.units.push_back(unit);
        done += span;
        if (span == 0 || done == chunk) break;
      }
    }
    batch.tokens += chunk;
  }
  return batch;
}

// Every (unit, M-tile, KV tile) exactly once; slots unique, in bounds and consecutive per M-tile; pieces not empty;
// classes descend, and inside a class units ascend, pieces ascend, M-tiles descend.
TEST(AttentionSchedule, RandomBatchesAreCoveredOnceInOrder) {
  for (std::uint32_t seed = 0; seed < 600; ++seed) {
    const RandomBatch batch = random_batch(seed);
    const Schedule& s = batch.schedule;
    SCOPED_TRACE(fmt::format("seed {} BM {} BN {} heads_per_unit {} workers {} fixed_split_tiles {} units {} T {}",
                             seed, s.tile_rows, s.tile_tokens, s.heads_per_unit, s.num_workers, s.fixed_split_tiles,
                             batch.units.size(), batch.tokens));
    const auto num_units = static_cast<std::int32_t>(batch.units.size());
    const auto max_m = static_cast<std::int32_t>(max_m_tiles(s, num_units, batch.tokens, batch.q_heads));
    std::int32_t longest_tiles = 0;
    for (const AttentionUnit& unit : batch.units)
      longest_tiles = std::max(longest_tiles, ceil_div(unit.list_tokens, s.tile_tokens));
    const auto max_slots = static_cast<std::int32_t>(
        s.fixed_split_tiles > 0 ? std::int64_t{max_m} * ceil_div(longest_tiles, s.fixed_split_tiles)
                                : max_load_slots(s.num_workers));
    const HostPlan plan = host_plan(s, batch.units, max_m, max_slots);
    ASSERT_EQ(plan.error, 0);
    ASSERT_EQ(plan.header.next_item, s.num_workers);

    std::map<std::pair<std::int32_t, std::int32_t>, std::vector<WorkItem>> by_tile;  // (unit, M-tile)
    std::set<std::int32_t> used_slots;
    for (const WorkItem& item : plan.items) by_tile[{item.unit, item.m_tile}].push_back(item);
    std::int64_t rows = 0;
    for (auto& [tile, pieces] : by_tile) {
      const AttentionUnit& unit = batch.units[static_cast<std::size_t>(tile.first)];
      const WorkItem whole = whole_m_tile(s, unit, tile.first, tile.second);
      rows += std::int64_t{whole.q_rows_valid} * s.heads_per_tile;
      std::int32_t next = 0;
      for (std::size_t p = 0; p < pieces.size(); ++p) {
        const WorkItem& piece = pieces[p];
        ASSERT_EQ(piece.tile_begin, next);
        next = piece.tile_end;
        ASSERT_EQ(piece.q_row, whole.q_row);
        ASSERT_EQ(piece.q_head, whole.q_head);
        ASSERT_GE(piece.q_rows_valid, 1);
        if (pieces.size() == 1) {
          ASSERT_EQ(piece.partial_slot, -1);
          continue;
        }
        ASSERT_GT(tile_count(piece), 0);
        ASSERT_EQ(piece.partial_slot, pieces[0].partial_slot + static_cast<std::int32_t>(p));
        ASSERT_TRUE(used_slots.insert(piece.partial_slot).second);
        const SlotItem& slot = plan.slots[static_cast<std::size_t>(piece.partial_slot)];
        ASSERT_EQ(slot.first_slot, pieces[0].partial_slot);
        ASSERT_EQ(slot.num_pieces, static_cast<std::int32_t>(pieces.size()));
        ASSERT_EQ(slot.piece, static_cast<std::int32_t>(p));
        ASSERT_EQ(std::tie(slot.q_row, slot.q_rows_valid, slot.q_head),
                  std::tie(whole.q_row, whole.q_rows_valid, whole.q_head));
      }
      ASSERT_EQ(next, whole.tile_end);
    }
    ASSERT_EQ(static_cast<std::int32_t>(used_slots.size()), plan.header.num_slots);
    if (!used_slots.empty()) {
      ASSERT_GE(*used_slots.begin(), 0);
      ASSERT_LT(*used_slots.rbegin(), plan.header.num_slots);
    }
    std::int64_t expected_rows = 0;
    for (const AttentionUnit& unit : batch.units) expected_rows += std::int64_t{unit.q_len} * s.heads_per_unit;
    ASSERT_EQ(rows, expected_rows);

    for (std::size_t i = 1; i < plan.items.size(); ++i) {
      const auto place = [&](const WorkItem& item) {
        const auto& pieces = by_tile[{item.unit, item.m_tile}];
        const auto count = static_cast<std::int32_t>(pieces.size());
        const std::int32_t piece = item.partial_slot < 0 ? 0 : item.partial_slot - pieces[0].partial_slot;
        return std::tuple(-length_class(pieces.back().tile_end, count), item.unit, piece, -item.m_tile);
      };
      ASSERT_LT(place(plan.items[i - 1]), place(plan.items[i])) << "item " << i;
    }
  }
}

// The bound on slots holds with a margin for any lengths: many tiles just above the cut.
TEST(AttentionSchedule, SlotsStayFarBelowTheBound) {
  for (const std::int32_t workers : {1, 8, 132}) {
    for (const std::int32_t m_tiles : {1, workers / 3 + 1, workers, 4 * workers / 3, 2 * workers, 5 * workers}) {
      for (std::int32_t tiles = 1; tiles < 400; tiles += 3) {
        Schedule s = h200(1);
        s.num_workers = workers;
        std::vector<AttentionUnit> units(static_cast<std::size_t>(m_tiles),
                                         {.q_len = 1, .list_tokens = tiles * 128, .past_tokens = tiles * 128});
        const HostPlan plan = host_plan(s, units, m_tiles, 5 * workers);
        ASSERT_EQ(plan.error, 0) << workers << " workers, " << m_tiles << " M-tiles of " << tiles << " tiles";
      }
    }
  }
}

}  // namespace
}  // namespace compact
