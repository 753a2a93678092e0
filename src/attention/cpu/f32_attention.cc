// The fp32 kernel: items of a few row tiles that share a walk over the unit's list.
//
//   pack     Q^T [D, M] of each tile, scale * log2(e) folded in; row r of a unit = (token r / heads, head r % heads)
//   walk     the list in blocks of kKeyBlock tokens, whatever the page size; a block's K and V serve every tile in turn
//   step     scores -> mask (diagonal blocks only) -> online softmax -> O^T; f32_step-inl.h
//   finish   O^T / sum, and LSE
//
// fp32 pages with contiguous rows are read in place. bf16 blocks are converted to scratch once for all tiles of an
// item. fp32 rows with gaps (NHD) are copied there too: at a stride of 4 KB the rows of a block fall into one set of
// L1, and the copy takes attention from 79 to 90 % of sgemm (L 4096, Hq 32, Hkv 8, D 64 and 128; set-up as below).
#include <algorithm>
#include <cmath>
#include <numbers>

#include "src/attention/cpu/item.h"

// NOTE: arrays of vectors need vectors of a size known to the compiler; Arm machines with SVE run the NEON code.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#define HWY_WANT_SSE4 1
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/attention/cpu/f32_attention.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "src/attention/cpu/f32_step-inl.h"

#ifndef COMPACT_ATTENTION_CPU_F32_ATTENTION_ONCE_
#define COMPACT_ATTENTION_CPU_F32_ATTENTION_ONCE_
namespace compact::cpu {

// Ice Lake server, 1 thread, AVX-512, C 1024, L 8192, P 128, Hq 8, Hkv 2, fp32, in % of the sgemm rate of the same run
// (attention_cpu_bench --threads 1 --cpu-time; the machine was busy, differences below 5 points are noise):
//   keys in a block  64 / 128 / 256      D 64: 99 / 95 / 86     D 128: 105 / 103 / 101
//   tiles in an item  1 / 2 / 4 / 8      D 64: 68 / 79 / 93 / 99   D 128: 71 / 91 / 104 / 98   (K and V staged)

/// Keys between two updates of the running maximum. S^T of a block (24 KB) and Q^T (24 KB at D 128) share L1.
inline constexpr std::int32_t kKeyBlock = 128;

/// Row tiles that share a walk over the list, and each staged block of K and V.
inline constexpr std::int32_t kMaxTilesPerItem = 8;

/// One thread's scratch. AVX-512 (M 48), D 128, 8 tiles: 390 KB of tiles + 24 KB of scores + 128 KB staged + 2 KB of
/// pointers, in 1.25 MB of L2.
struct F32Scratch {
  float* tiles = nullptr;          // [tiles_per_item, tile_floats]
  float* scores = nullptr;         // [kKeyBlock, M]  S^T, then P^T of the tile at work
  float* staged_k = nullptr;       // [kKeyBlock, D]
  float* staged_v = nullptr;       // [kKeyBlock, D]
  const float** k_rows = nullptr;  // [kKeyBlock]     where each key of the block lies
  const float** v_rows = nullptr;  // [kKeyBlock]
};

/// A tile's part: Q^T [D, M], O^T [D, M], maximum, sum, rescale, limit [M].
constexpr std::int64_t tile_floats(std::int64_t head_dim, std::int64_t m) { return (2 * head_dim + 4) * m; }

}  // namespace compact::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace compact::cpu {
namespace HWY_NAMESPACE {
namespace {

constexpr std::int32_t kTileRows = kVectors * static_cast<std::int32_t>(hn::MaxLanes(DF()));

// Packs rows [first_row, first_row + rows) of the unit and resets their running state.
void start_tile(const Call& call, const AttentionUnit& unit, std::int64_t first_row, std::int64_t rows, float* scratch,
                Tile& tile) {
  using D4 = hn::FixedTag<float, 4>;
  const D4 d4;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(DF()));
  const std::int64_t head_dim = call.input.q.head_dim;
  const std::int64_t m = (rows + lanes - 1) / lanes * lanes;
  float* qt = scratch;
  tile.qt = qt;
  tile.ot = qt + head_dim * m;
  tile.row_max = tile.ot + head_dim * m;
  tile.row_sum = tile.row_max + m;
  tile.rescale = tile.row_sum + m;
  tile.limit = reinterpret_cast<std::int32_t*>(tile.rescale + m);
  reset_tile(call, unit, first_row, rows, m, tile);

  const auto scale = hn::Set(d4, static_cast<float>(double{call.input.softmax_scale} * std::numbers::log2e));
  for (std::int64_t r = 0; r < m; r += 4) {
    const float* q[4];
    query_rows(call, unit, first_row + r, first_row + rows, q);
    for (std::int64_t i = 0; i < head_dim; i += 4) {
      hn::Vec<D4> part[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) part[k] = hn::LoadU(d4, q[k] + i);
      transpose_4x4<float>(part);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) hn::Store(hn::Mul(part[k], scale), d4, qt + (i + k) * m + r);
    }
  }
  std::fill_n(tile.ot, head_dim * m, 0.0F);
  tile.started = true;
}

// Copies one token's K or V row to fp32 scratch. Eight lanes divide every head dimension.
void stage_row(DType dtype, const void* base, std::int64_t offset, std::int64_t head_dim, float* HWY_RESTRICT out) {
  const hn::CappedTag<float, 8> d;
  const hn::Rebind<std::uint16_t, decltype(d)> d16;
  const hn::Rebind<std::uint32_t, decltype(d)> d32;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  if (dtype == DType::kF32) {
    const float* in = static_cast<const float*>(base) + offset;
    for (std::int64_t i = 0; i < head_dim; i += lanes) hn::Store(hn::LoadU(d, in + i), d, out + i);
  } else {
    const std::uint16_t* in = static_cast<const std::uint16_t*>(base) + offset;
    for (std::int64_t i = 0; i < head_dim; i += lanes) {
      hn::Store(hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, hn::LoadU(d16, in + i)))), d, out + i);
    }
  }
}

// Sets the pointers of list coordinates [first_key, first_key + num_keys), and repeats the last up to the register
// block.
void locate_block(const Call& call, const AttentionUnit& unit, std::int32_t first_key, std::int32_t num_keys,
                  bool stage, const F32Scratch& scratch) {
  const PagedKvView& kv = call.input.kv;
  const std::int64_t head_dim = kv.head_dim;
  std::int32_t entry = unit.list_begin + first_key / kv.page_tokens;
  std::int32_t token = first_key % kv.page_tokens;
  for (std::int32_t key = 0; key < num_keys; ++key) {
    const std::int64_t offset = kv.offset(call.input.page_ids[static_cast<std::size_t>(entry)], token, unit.kv_head);
    if (stage) {
      stage_row(kv.dtype, kv.k, offset, head_dim, scratch.staged_k + key * head_dim);
      stage_row(kv.dtype, kv.v, offset, head_dim, scratch.staged_v + key * head_dim);
      scratch.k_rows[key] = scratch.staged_k + key * head_dim;
      scratch.v_rows[key] = scratch.staged_v + key * head_dim;
    } else {
      scratch.k_rows[key] = static_cast<const float*>(kv.k) + offset;
      scratch.v_rows[key] = static_cast<const float*>(kv.v) + offset;
    }
    if (++token == kv.page_tokens) {
      token = 0;
      ++entry;
    }
  }
  for (std::int32_t key = num_keys; key % kBroadcasts != 0; ++key) scratch.k_rows[key] = scratch.k_rows[num_keys - 1];
}

// Sets the pointers of the means of a unit's dropped pages [first, first + num_keys), padded as above.
void locate_means(const Call& call, const AttentionUnit& unit, std::int32_t first_entry, std::int32_t num_keys,
                  const F32Scratch& scratch) {
  const MeanCorrection& correction = call.input.correction;
  for (std::int32_t key = 0; key < num_keys; ++key) {
    const std::int64_t page = correction.dropped_ids[static_cast<std::size_t>(first_entry + key)];
    const std::int64_t at = (page * call.input.kv.num_kv_heads + unit.kv_head) * call.input.kv.head_dim;
    scratch.k_rows[key] = correction.mean_k + at;
    scratch.v_rows[key] = correction.mean_v + at;
  }
  for (std::int32_t key = num_keys; key % kBroadcasts != 0; ++key) scratch.k_rows[key] = scratch.k_rows[num_keys - 1];
}

F32Scratch carve(const Call& call, std::byte* at) {
  F32Scratch scratch;
  scratch.k_rows = reinterpret_cast<const float**>(at);
  scratch.v_rows = scratch.k_rows + kKeyBlock;
  scratch.scores = reinterpret_cast<float*>(scratch.v_rows + kKeyBlock);
  scratch.tiles = scratch.scores + kKeyBlock * kTileRows;
  scratch.staged_k = scratch.tiles + call.tiles_per_item * tile_floats(call.input.q.head_dim, kTileRows);
  scratch.staged_v = scratch.staged_k + kKeyBlock * call.input.q.head_dim;
  return scratch;
}

std::int64_t scratch_bytes(const Call& call) {
  auto* const base = reinterpret_cast<std::byte*>(std::uintptr_t{64});  // addresses are taken, not used
  return reinterpret_cast<std::byte*>(carve(call, base).staged_v + kKeyBlock * call.input.q.head_dim) - base;
}

void step_tile(const Call& call, const Tile& tile, const KeyBlock& block, const F32Scratch& scratch, SkipCount& count) {
  const auto step = tile.vectors == 1 ? f32_step<1> : tile.vectors == 2 ? f32_step<2> : f32_step<kVectors>;
  ++count.steps;
  if (!step(tile, call.input.q.head_dim, block, call.log2_lambda, scratch.scores)) ++count.skipped;
}

void attend(const Call& call, const Item& item, std::byte* scratch_memory, SkipCount& count) {
  const F32Scratch scratch = carve(call, scratch_memory);
  const AttentionUnit& unit = call.input.units[static_cast<std::size_t>(item.unit)];
  const PagedKvView& kv = call.input.kv;
  Tile tiles[kMaxTilesPerItem];
  std::int32_t num_tiles = 0;
  for (std::int64_t row = 0; row < item.num_rows; row += kTileRows, ++num_tiles) {
    const std::int64_t rows = std::min<std::int64_t>(item.num_rows - row, kTileRows);
    start_tile(call, unit, item.first_row + row, rows, scratch.tiles + num_tiles * tile_floats(kv.head_dim, kTileRows),
               tiles[num_tiles]);
  }

  // Values are the same staged or not. A single tile would read each strided row twice at most: not worth a copy.
  const bool stage = kv.dtype != DType::kF32 || (kv.token_stride != kv.head_dim && num_tiles > 1);
  const std::int32_t end = tiles[num_tiles - 1].most_limit;
  for (std::int32_t first_key = 0; first_key < end; first_key += kKeyBlock) {
    const std::int32_t num_keys = std::min(end - first_key, kKeyBlock);
    locate_block(call, unit, first_key, num_keys, stage, scratch);
    KeyBlock block{.k_rows = scratch.k_rows, .v_rows = scratch.v_rows, .first_key = first_key};
    for (std::int32_t t = 0; t < num_tiles; ++t) {
      block.num_keys = std::min(tiles[t].most_limit - first_key, num_keys);
      if (block.num_keys > 0) step_tile(call, tiles[t], block, scratch, count);
    }
  }
  if (!call.input.correction.dropped.empty()) {
    const DroppedPages dropped = call.input.correction.dropped[static_cast<std::size_t>(item.unit)];
    for (std::int32_t first = 0; first < dropped.count; first += kKeyBlock) {
      KeyBlock block{.k_rows = scratch.k_rows, .v_rows = scratch.v_rows, .bias = call.log2_page_tokens};
      block.may_hide = false;
      block.num_keys = std::min(dropped.count - first, kKeyBlock);
      locate_means(call, unit, dropped.begin + first, block.num_keys, scratch);
      for (std::int32_t t = 0; t < num_tiles; ++t) step_tile(call, tiles[t], block, scratch, count);
    }
  }
  for (std::int32_t t = 0; t < num_tiles; ++t) finish_tile(call, unit, tiles[t]);
}

}  // namespace

const char* target_name() { return hwy::TargetName(HWY_TARGET); }

Kernel f32_kernel_of_target() {
  return {.tile_rows = kTileRows, .tiles_per_item = kMaxTilesPerItem, .scratch_bytes = scratch_bytes, .attend = attend};
}

}  // namespace HWY_NAMESPACE
}  // namespace compact::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace compact {
namespace cpu {
HWY_EXPORT(f32_kernel_of_target);
HWY_EXPORT(target_name);
Kernel f32_kernel() { return HWY_DYNAMIC_DISPATCH(f32_kernel_of_target)(); }
}  // namespace cpu
const char* cpu_attention_target() noexcept { return HWY_DYNAMIC_DISPATCH(cpu::target_name)(); }
}  // namespace compact
#endif
