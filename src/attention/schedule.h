// Decisions of the CUDA work schedule: packing of rows into M-tiles, tiles an M-tile has to read, cutting, order. Pure
// functions for host and device; no CUDA types. The design and the numbers behind it: docs/design/cuda-backend.md.
#pragma once

#include <bit>
#include <cstdint>

#include "compact/attention_unit.h"
#include "src/attention/work_item.h"
#include "src/core/host_device.h"

namespace compact {

// What the plan depends on besides the units. Tile sizes are run-time numbers: one prepare kernel serves every kernel.
struct Schedule {
  std::int32_t tile_rows = 0;    // BM  packed query rows of an M-tile
  std::int32_t tile_tokens = 0;  // BN  list tokens of a KV tile
  std::int32_t heads_per_unit = 0;
  std::int32_t heads_per_tile = 0;     // hpt
  std::int32_t num_workers = 0;        // CTAs of the main kernel that run at once
  std::int32_t fixed_split_tiles = 0;  // 0: cut by load; n: pieces [0, n), [n, 2n), ... whatever the load
};

constexpr std::int32_t kMaxHeadsPerTile = 64;    // the largest power of two that divides every BM in use (128, 192)
constexpr std::int32_t kMinCapTiles = 8;         // a piece shorter than this costs more in overhead than it balances
constexpr std::int32_t kNumLengthClasses = 128;  // eight per octave: 2^16 tiles before the last class is shared

CA_HOST_DEVICE constexpr std::int32_t min_i32(std::int32_t a, std::int32_t b) { return a < b ? a : b; }
CA_HOST_DEVICE_CALL constexpr std::int32_t divide(std::int32_t a, std::int32_t b) { return a / b; }
CA_HOST_DEVICE constexpr std::int32_t ceil_div(std::int32_t a, std::int32_t b) {
  const std::int32_t quotient = divide(a, b);
  return quotient + (quotient * b != a);
}

CA_HOST_DEVICE inline std::int32_t floor_log2(std::int32_t positive) {
#ifdef __CUDA_ARCH__
  return 31 - __clz(positive);
#else
  return 31 - std::countl_zero(static_cast<std::uint32_t>(positive));
#endif
}

// Query heads that share an M-tile: the largest power of two dividing heads_per_unit, so that row r of a tile is token
// r / hpt, head r % hpt, by shift and mask.
CA_HOST_DEVICE constexpr std::int32_t heads_per_tile(std::int32_t heads_per_unit) {
  return min_i32(heads_per_unit & -heads_per_unit, kMaxHeadsPerTile);
}

CA_HOST_DEVICE inline std::int32_t tokens_per_tile(const Schedule& s) {
  return s.tile_rows >> floor_log2(s.heads_per_tile);
}
CA_HOST_DEVICE inline std::int32_t head_slots(const Schedule& s) {
  return s.heads_per_unit >> floor_log2(s.heads_per_tile);
}

// M-tile m of a unit is token tile m / head_slots, head slot m % head_slots: a larger m sees at least as much.
CA_HOST_DEVICE inline std::int32_t num_m_tiles(const Schedule& s, const AttentionUnit& unit) {
  return unit.q_len <= 0 ? 0 : head_slots(s) * ceil_div(unit.q_len, tokens_per_tile(s));
}

// Host bound of the M-tiles of any units that share no rows: every unit may leave one tile per head slot part filled.
inline std::int64_t max_m_tiles(const Schedule& s, std::int32_t max_units, std::int32_t num_q_tokens,
                                std::int32_t num_q_heads) {
  return std::int64_t{num_q_tokens} * num_q_heads / s.tile_rows + std::int64_t{max_units} * head_slots(s);
}

// M-tile m of the unit as one whole item: every KV tile that its last query sees.
CA_HOST_DEVICE inline WorkItem whole_m_tile(const Schedule& s, const AttentionUnit& unit, std::int32_t unit_idx,
                                            std::int32_t m_tile) {
  const std::int32_t token_tile = divide(m_tile, head_slots(s));
  const std::int32_t first_query = token_tile * tokens_per_tile(s);
  const std::int32_t list_tokens = unit.list_tokens > 0 ? unit.list_tokens : 0;
  // 64 bits: the sum of a long context and a long chunk may pass 2^31 although both lists and chunks are below it.
  constexpr std::int64_t kMaxBase = 0x7fffffff - 4096;
  const std::int64_t base = std::int64_t{unit.past_tokens} + unit.causal_shift + first_query;
  WorkItem item{};
  item.q_row = unit.q_begin + first_query;
  item.q_rows_valid = min_i32(tokens_per_tile(s), unit.q_len - first_query);
  item.q_head = unit.q_head + (m_tile - token_tile * head_slots(s)) * s.heads_per_tile;
  item.kv_head = unit.kv_head;
  item.list_begin = unit.list_begin;
  item.list_tokens = list_tokens;
  item.visible_base = static_cast<std::int32_t>(base < kMaxBase ? base : kMaxBase);
  item.tile_begin = 0;
  item.tile_end = ceil_div(min_i32(list_tokens, item.visible_base + item.q_rows_valid), s.tile_tokens);
  item.first_masked_tile = divide(min_i32(list_tokens, item.visible_base + 1), s.tile_tokens);
  item.partial_slot = -1;
  item.unit = unit_idx;
  item.m_tile = m_tile;
  return item;
}

// What an item costs beside its tiles, in KV tiles: start and epilogue; a cut one also writes fp32 partials. And the
// combine kernel, once. Start values from one H200: docs/design/sm90-kernel.md.
constexpr std::int32_t kWholeItemTiles = 2;
constexpr std::int32_t kCutItemTiles = 5;
constexpr std::int32_t kCombineTiles = 4;
constexpr std::int32_t kMostWavesCut = 4;  // from this many M-tiles per worker on, only outliers are cut

// Pieces longer than this are cut. With few M-tiles per worker the last wave decides: 176 equal M-tiles on 132 workers
// take two rounds, cut in three they take four rounds of a third each. So pieces are chosen for 1 to 4 full waves,
// whichever is cheapest if all M-tiles had the mean length; a margin of 10 % keeps tiles a little longer in as many
// pieces. With many M-tiles per worker: half of a worker's share, with the same margin.
CA_HOST_DEVICE constexpr std::int32_t cap_tiles(std::int64_t total_tiles, std::int32_t m_tiles,
                                                std::int32_t num_workers) {
  constexpr std::int64_t kMaxCap = 0x7fffffff;  // no list is that long
  std::int64_t share = 11 * total_tiles, divisor = std::int64_t{20} * num_workers;
  if (m_tiles > 0 && m_tiles < kMostWavesCut * num_workers) {
    constexpr std::int64_t kLongMean = 1 << 20;  // costs fit 32 bits, and nothing is decided differently beyond
    const std::int64_t mean = (total_tiles + m_tiles - 1) / m_tiles;
    const auto bounded_mean = static_cast<std::int32_t>(mean < kLongMean ? mean : kLongMean);
    std::int32_t best_cost = 0, best_pieces = 0;
    CA_DEVICE_NO_UNROLL
    for (std::int32_t waves = ceil_div(m_tiles, num_workers); waves <= kMostWavesCut; ++waves) {
      const std::int32_t pieces = divide(waves * num_workers, m_tiles);
      const std::int32_t overhead = pieces > 1 ? kCutItemTiles : kWholeItemTiles;
      const std::int32_t cost =
          divide(waves * (bounded_mean + overhead * pieces), pieces) + (pieces > 1 ? kCombineTiles : 0);
      if (best_pieces == 0 || cost < best_cost) best_cost = cost, best_pieces = pieces;
    }
    share = 11 * mean;
    divisor = std::int64_t{10} * best_pieces;
  }
  const std::int64_t cap = (share + divisor - 1) / divisor;
  if (cap <= kMinCapTiles) return kMinCapTiles;
  return static_cast<std::int32_t>(cap < kMaxCap ? cap : kMaxCap);
}

// Pieces of an M-tile of n KV tiles; grows with n. A tile up to 1.25 caps long stays whole: two halves would pay the
// cost per item twice to save a quarter of a cap.
CA_HOST_DEVICE_CALL constexpr std::int32_t num_pieces(const Schedule& s, std::int32_t cap, std::int32_t n) {
  if (s.fixed_split_tiles > 0) return n > s.fixed_split_tiles ? ceil_div(n, s.fixed_split_tiles) : 1;
  return std::int64_t{4} * n > std::int64_t{5} * cap ? ceil_div(n, cap) : 1;
}

// First tile of piece p; piece p ends where p + 1 begins. Never empty for p < pieces.
CA_HOST_DEVICE constexpr std::int32_t piece_begin(const Schedule& s, std::int32_t n, std::int32_t pieces,
                                                  std::int32_t p) {
  if (s.fixed_split_tiles > 0) return p == pieces ? n : p * s.fixed_split_tiles;
  const std::int32_t length = divide(n, pieces);
  return p * length + min_i32(p, n - pieces * length);
}

// Order of dispatch is by descending class, eight classes per octave. The pieces of an M-tile go by their mean length.
CA_HOST_DEVICE inline std::int32_t length_class(std::int32_t n, std::int32_t pieces) {
  const std::int32_t length = pieces == 1 ? n : ceil_div(n, pieces);
  if (length <= 0) return 0;
  const std::int32_t octave = floor_log2(length);
  const std::int32_t eighth = static_cast<std::int32_t>((std::int64_t{length} << 3) >> octave) & 7;
  return min_i32(8 * octave + eighth, kNumLengthClasses - 1);
}

// Most partial slots that cutting by load can give: a cut tile has more than 1.25 caps and ceil(x) / x < 1.6 there, so
// the pieces number less than 1.6 * total / cap, which is at most 1.46 * kMostWavesCut * num_workers.
constexpr std::int64_t max_load_slots(std::int32_t num_workers) { return std::int64_t{6} * num_workers; }

CA_HOST_DEVICE constexpr std::int32_t tile_count(const WorkItem& item) { return item.tile_end - item.tile_begin; }

}  // namespace compact
