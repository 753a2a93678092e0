// The bf16 kernel: K, V as stored, Q and the weights rounded to bf16, fp32 sums. For machines that multiply bf16 faster
// than fp32; the products themselves are in bf16_product.h.
//
//   pack     Q pairs [D / 2, M, 2] of each tile, unscaled: the softmax scale enters with the exponential, in fp32
//   walk     the list in blocks of kKeyBlock tokens; V^T of a block (and K, if 16 keys of a page are not D contiguous
//            multiples of 32 apart) is staged once for all tiles of the item
//   step     S^T = K Q^T -> mask -> weights as bf16 pairs -> O^T += V^T P^T; bf16_step-inl.h
//   finish   O^T / sum, and LSE
#include <algorithm>

#include "src/attention/cpu/bf16_product.h"
#include "src/attention/cpu/item.h"

#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#define HWY_WANT_SSE4 1
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/attention/cpu/bf16_attention.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "src/attention/cpu/bf16_step-inl.h"

#ifndef COMPACT_ATTENTION_CPU_BF16_ATTENTION_ONCE_
#define COMPACT_ATTENTION_CPU_BF16_ATTENTION_ONCE_
namespace compact::cpu {

/// Rows of a tile: S^T (16 KB), P^T (8 KB), Q (8 KB) and a panel of O^T share L1 at D 128.
inline constexpr std::int32_t kBf16TileRows = 32;
/// Keys between two updates of the running maximum.
inline constexpr std::int32_t kBf16KeyBlock = 128;
/// Tiles that share a staged block: 512 rows; transposing V costs about 5 % of a block's work then. 24 KB each at D
/// 128.
inline constexpr std::int32_t kBf16TilesPerItem = 16;

constexpr std::int64_t round_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }

/// One thread's scratch.
struct Bf16Scratch {
  std::byte* tiles = nullptr;        // [tiles_per_item, tile_bytes]
  float* scores = nullptr;           // [kBf16KeyBlock, M]
  std::uint32_t* weights = nullptr;  // [kBf16KeyBlock / 2, M]  pairs
  Bf16* vt = nullptr;                // [D rounded up to 16, kBf16KeyBlock]
  Bf16* v = nullptr;                 // [kBf16KeyBlock, D]  means of dropped pages, rounded
  Bf16* k = nullptr;                 // [kBf16KeyBlock, D rounded up to 32]
  const Bf16** v_rows = nullptr;     // [kBf16KeyBlock]
  const Bf16** k_groups = nullptr;   // [kBf16KeyBlock / 16]
  const Bf16** vt_groups = nullptr;  // [D / 16 rounded up]
  std::byte* end = nullptr;
};

}  // namespace compact::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace compact::cpu {
namespace HWY_NAMESPACE {
namespace {

// Q pairs, O^T, then maximum, sum, rescale, limit.
std::int64_t tile_bytes(std::int64_t head_dim, std::int64_t m) {
  return round_up(head_dim, 32) * m * 2 + (round_up(head_dim, 16) + 4) * m * 4;
}

// Packs rows [first_row, first_row + rows) of the unit and resets their running state. M: 16, or kBf16TileRows.
void start_tile(const Call& call, const AttentionUnit& unit, std::int64_t first_row, std::int64_t rows,
                std::byte* scratch, Tile& tile) {
  const std::int64_t head_dim = call.input.q.head_dim;
  const std::int64_t m = rows <= 16 ? 16 : kBf16TileRows;
  auto* qt = reinterpret_cast<std::uint32_t*>(scratch);
  tile.qt = qt;
  tile.ot = reinterpret_cast<float*>(qt + round_up(head_dim, 32) / 2 * m);
  tile.row_max = tile.ot + round_up(head_dim, 16) * m;
  tile.row_sum = tile.row_max + m;
  tile.rescale = tile.row_sum + m;
  tile.limit = reinterpret_cast<std::int32_t*>(tile.rescale + m);
  reset_tile(call, unit, first_row, rows, m, tile);

  const hn::FixedTag<std::uint32_t, 4> d4;
  for (std::int64_t r = 0; r < m; r += 4) {
    const float* q[4];
    query_rows(call, unit, first_row + r, first_row + rows, q);
    for (std::int64_t i = 0; i < head_dim; i += 8) {
      hn::Vec<decltype(d4)> part[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) part[k] = bf16_pairs(q[k] + i);
      transpose_4x4<std::uint32_t>(part);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) hn::Store(part[k], d4, qt + (i / 2 + k) * m + r);
    }
  }
  std::fill(qt + head_dim / 2 * m, qt + round_up(head_dim, 32) / 2 * m, 0U);
}

// Copies a K row, zero in [D, D rounded up to 32): the products run over whole steps of 32, and 0 * NaN is NaN.
void stage_key(const Bf16* from, std::int64_t head_dim, Bf16* to) {
  std::copy_n(from, head_dim, to);
  std::fill(to + head_dim, to + round_up(head_dim, 32), Bf16{0});
}

// V^T of the block's v_rows, with zeros up to the next step of 32 keys: their weights are tiny, not 0, and 0 * NaN is
// NaN.
void stage_values(std::int64_t head_dim, std::int32_t num_keys, const Bf16Scratch& scratch) {
  alignas(64) static constexpr Bf16 kZeros[256] = {};
  const auto padded = static_cast<std::int32_t>(round_up(num_keys, 32));
  std::fill(scratch.v_rows + num_keys, scratch.v_rows + padded, kZeros);
  transpose_values<kBf16KeyBlock>(scratch.v_rows, padded, head_dim, scratch.vt);
}

// K and V of list coordinates [first_key, first_key + num_keys).
Bf16Block stage_list(const Call& call, const AttentionUnit& unit, std::int32_t first_key, std::int32_t num_keys,
                     const Bf16Scratch& scratch) {
  const PagedKvView& kv = call.input.kv;
  const std::int64_t head_dim = kv.head_dim;
  const bool in_place = head_dim % 32 == 0 && kv.page_tokens % 16 == 0 && kv.token_stride == head_dim;
  const auto* k = static_cast<const Bf16*>(kv.k);
  const auto* v = static_cast<const Bf16*>(kv.v);
  std::int32_t entry = unit.list_begin + first_key / kv.page_tokens;
  std::int32_t token = first_key % kv.page_tokens;
  for (std::int32_t key = 0; key < num_keys; ++key) {
    const std::int64_t offset = kv.offset(call.input.page_ids[static_cast<std::size_t>(entry)], token, unit.kv_head);
    scratch.v_rows[key] = v + offset;
    if (in_place) {
      // A page holds whole groups; what lies behind the list's end in the last one is masked.
      if (key % 16 == 0) scratch.k_groups[key / 16] = k + offset;
    } else {
      stage_key(k + offset, head_dim, scratch.k + key * round_up(head_dim, 32));
    }
    if (++token == kv.page_tokens) {
      token = 0;
      ++entry;
    }
  }
  Bf16Block block{.k_groups = scratch.k_groups, .vt_groups = scratch.vt_groups};
  block.k_stride = in_place ? kv.token_stride : round_up(head_dim, 32);
  block.vt_stride = kBf16KeyBlock;
  block.first_key = first_key;
  block.num_keys = num_keys;
  const std::int32_t groups = static_cast<std::int32_t>(round_up(num_keys, 32)) / 16;
  if (in_place) {
    for (std::int32_t g = (num_keys + 15) / 16; g < groups; ++g) scratch.k_groups[g] = scratch.k_groups[0];
  } else {
    for (std::int32_t g = 0; g < groups; ++g) scratch.k_groups[g] = scratch.k + g * 16 * round_up(head_dim, 32);
  }
  stage_values(head_dim, num_keys, scratch);
  return block;
}

// Brings K and V of list coordinates [first_key, end_key) into L2, a few keys per tile step: the next block's memory
// time hides behind this block's arithmetic.
void prefetch_keys(const Call& call, const AttentionUnit& unit, std::int32_t first_key, std::int32_t end_key) {
  const PagedKvView& kv = call.input.kv;
  constexpr std::int64_t kLine = 64 / sizeof(Bf16);
  for (std::int32_t key = first_key; key < end_key; ++key) {
    const auto entry = static_cast<std::size_t>(unit.list_begin + key / kv.page_tokens);
    const std::int64_t offset = kv.offset(call.input.page_ids[entry], key % kv.page_tokens, unit.kv_head);
    for (std::int64_t i = 0; i < kv.head_dim; i += kLine) {
      __builtin_prefetch(static_cast<const Bf16*>(kv.k) + offset + i, 0, 2);
      __builtin_prefetch(static_cast<const Bf16*>(kv.v) + offset + i, 0, 2);
    }
  }
}

// The means of dropped pages [first_entry, first_entry + num_keys), rounded to bf16.
Bf16Block stage_means(const Call& call, const AttentionUnit& unit, std::int32_t first_entry, std::int32_t num_keys,
                      const Bf16Scratch& scratch) {
  const MeanCorrection& correction = call.input.correction;
  const std::int64_t head_dim = call.input.kv.head_dim;
  for (std::int32_t key = 0; key < num_keys; ++key) {
    const std::int64_t page = correction.dropped_ids[static_cast<std::size_t>(first_entry + key)];
    const std::int64_t at = (page * call.input.kv.num_kv_heads + unit.kv_head) * head_dim;
    Bf16* k = scratch.k + key * round_up(head_dim, 32);
    Bf16* v = scratch.v + key * head_dim;
    std::transform(correction.mean_k + at, correction.mean_k + at + head_dim, k, to_bf16);
    std::fill(k + head_dim, k + round_up(head_dim, 32), Bf16{0});
    std::transform(correction.mean_v + at, correction.mean_v + at + head_dim, v, to_bf16);
    scratch.v_rows[key] = v;
  }
  for (std::int32_t g = 0; g < round_up(num_keys, 32) / 16; ++g) {
    scratch.k_groups[g] = scratch.k + g * 16 * round_up(head_dim, 32);
  }
  stage_values(head_dim, num_keys, scratch);
  Bf16Block block{.k_groups = scratch.k_groups, .vt_groups = scratch.vt_groups};
  block.k_stride = round_up(head_dim, 32);
  block.vt_stride = kBf16KeyBlock;
  block.num_keys = num_keys;
  block.bias = call.log2_page_tokens;
  block.may_hide = false;
  return block;
}

Bf16Scratch carve(const Call& call, std::byte* memory) {
  const std::int64_t head_dim = call.input.q.head_dim;
  Bf16Scratch scratch;
  std::byte* at = memory;
  const auto take = [&at](auto*& part, std::int64_t count) {
    part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(at);
    at += round_up(count * static_cast<std::int64_t>(sizeof(*part)), 64);
  };
  take(scratch.tiles, call.tiles_per_item * tile_bytes(head_dim, kBf16TileRows));
  take(scratch.scores, kBf16KeyBlock * kBf16TileRows);
  take(scratch.weights, kBf16KeyBlock / 2 * kBf16TileRows);
  take(scratch.vt, round_up(head_dim, 16) * kBf16KeyBlock);
  take(scratch.v, kBf16KeyBlock * head_dim);
  take(scratch.k, kBf16KeyBlock * round_up(head_dim, 32));
  take(scratch.v_rows, kBf16KeyBlock);
  take(scratch.k_groups, kBf16KeyBlock / 16);
  take(scratch.vt_groups, round_up(head_dim, 16) / 16);
  scratch.end = at;
  return scratch;
}

std::int64_t scratch_bytes(const Call& call) {
  auto* const base = reinterpret_cast<std::byte*>(std::uintptr_t{64});  // addresses are taken, not used
  return carve(call, base).end - base;
}

void step_tile(const Call& call, Tile& tile, const Bf16Block& block, const Bf16Scratch& scratch, SkipCount& count) {
  const bool narrow = tile.vectors * static_cast<std::int32_t>(hn::Lanes(DF())) == 16;
  const auto step = narrow ? bf16_step<16> : bf16_step<kBf16TileRows>;
  ++count.steps;
  if (!step(call, tile, block, scratch.scores, scratch.weights)) ++count.skipped;
}

void attend(const Call& call, const Item& item, std::byte* scratch_memory, SkipCount& count) {
  const Bf16Scratch scratch = carve(call, scratch_memory);
  const AttentionUnit& unit = call.input.units[static_cast<std::size_t>(item.unit)];
  const std::int64_t head_dim = call.input.q.head_dim;
  for (std::int64_t g = 0; g < round_up(head_dim, 16) / 16; ++g) {
    scratch.vt_groups[g] = scratch.vt + g * 16 * kBf16KeyBlock;
  }
  Tile tiles[kBf16TilesPerItem];
  std::int32_t num_tiles = 0;
  for (std::int64_t row = 0; row < item.num_rows; row += kBf16TileRows, ++num_tiles) {
    const std::int64_t rows = std::min<std::int64_t>(item.num_rows - row, kBf16TileRows);
    start_tile(call, unit, item.first_row + row, rows, scratch.tiles + num_tiles * tile_bytes(head_dim, kBf16TileRows),
               tiles[num_tiles]);
  }

  call.product->begin();
  const std::int32_t end = tiles[num_tiles - 1].most_limit;
  for (std::int32_t first_key = 0; first_key < end; first_key += kBf16KeyBlock) {
    Bf16Block block = stage_list(call, unit, first_key, std::min(end - first_key, kBf16KeyBlock), scratch);
    const std::int32_t num_keys = block.num_keys;
    const std::int32_t next_key = first_key + kBf16KeyBlock;
    for (std::int32_t t = 0; t < num_tiles; ++t) {
      block.num_keys = std::min(tiles[t].most_limit - first_key, num_keys);
      if (block.num_keys > 0) step_tile(call, tiles[t], block, scratch, count);
      prefetch_keys(call, unit, std::min(end, next_key + t * kBf16KeyBlock / num_tiles),
                    std::min(end, next_key + (t + 1) * kBf16KeyBlock / num_tiles));
    }
  }
  if (!call.input.correction.dropped.empty()) {
    const DroppedPages dropped = call.input.correction.dropped[static_cast<std::size_t>(item.unit)];
    for (std::int32_t first = 0; first < dropped.count; first += kBf16KeyBlock) {
      const std::int32_t num_keys = std::min(dropped.count - first, kBf16KeyBlock);
      const Bf16Block block = stage_means(call, unit, dropped.begin + first, num_keys, scratch);
      for (std::int32_t t = 0; t < num_tiles; ++t) step_tile(call, tiles[t], block, scratch, count);
    }
  }
  call.product->end();
  for (std::int32_t t = 0; t < num_tiles; ++t) finish_tile(call, unit, tiles[t]);
}

}  // namespace

Kernel bf16_kernel_of_target() {
  return {.tile_rows = kBf16TileRows,
          .tiles_per_item = kBf16TilesPerItem,
          .scratch_bytes = scratch_bytes,
          .attend = attend};
}

}  // namespace HWY_NAMESPACE
}  // namespace compact::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace compact::cpu {
HWY_EXPORT(bf16_kernel_of_target);
Kernel bf16_kernel() { return HWY_DYNAMIC_DISPATCH(bf16_kernel_of_target)(); }
}  // namespace compact::cpu
#endif
