// CPU attention over page lists: plan, scratch, and one item per instruction set.
//
// An item is (unit, a few consecutive row tiles). It owns its rows of O and LSE; nothing is shared between items, and a
// row's arithmetic depends on neither its neighbours nor the grouping: bits do not depend on the number of threads.
//   pack     Q^T [D, M] of each tile, scale * log2(e) folded in; row r of a unit = (token r / heads, head r % heads)
//   walk     the list in blocks of kKeyBlock tokens, whatever the page size; a block's K and V serve every tile in turn
//   step     scores -> mask (diagonal blocks only) -> online softmax -> O^T; tile_kernel-inl.h
//   unpack   O^T / sum, and LSE
//
// fp32 pages with contiguous rows are read in place. bf16 blocks are converted to scratch once for all tiles of an
// item. fp32 rows with gaps (NHD) are copied there too: at a stride of 4 KB the rows of a block fall into one set of
// L1, and the copy takes attention from 79 to 90 % of sgemm (L 4096, Hq 32, Hkv 8, D 64 and 128; set-up as in item.h).
#include "compact/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <numbers>
#include <vector>

#include "src/attention/cpu/item.h"
#include "src/attention/validate.h"

// NOTE: arrays of vectors need vectors of a size known to the compiler; Arm machines with SVE run the NEON code.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#define HWY_WANT_SSE4 1
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/attention/cpu/attention.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "src/attention/cpu/tile_kernel-inl.h"

HWY_BEFORE_NAMESPACE();
namespace compact::cpu {
namespace HWY_NAMESPACE {

const char* target_name() { return hwy::TargetName(HWY_TARGET); }

std::int32_t max_tile_rows() { return kVectors * static_cast<std::int32_t>(hn::Lanes(DF())); }

// Packs rows [first_row, first_row + rows) of the unit and resets their running state.
void start_tile(const Call& call, const AttentionUnit& unit, std::int64_t first_row, std::int64_t rows, float* scratch,
                Tile& tile) {
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(DF()));
  const std::int64_t head_dim = call.input.q.head_dim;
  const std::int32_t heads = call.input.heads_per_unit;
  tile.vectors = static_cast<std::int32_t>((rows + lanes - 1) / lanes);
  tile.rows = static_cast<std::int32_t>(rows);
  tile.first_row = first_row;
  const std::int64_t m = tile.vectors * lanes;
  tile.qt = scratch;
  tile.ot = tile.qt + head_dim * m;
  tile.row_max = tile.ot + head_dim * m;
  tile.row_sum = tile.row_max + m;
  tile.rescale = tile.row_sum + m;
  tile.limit = reinterpret_cast<std::int32_t*>(tile.rescale + m);

  const float scale = static_cast<float>(double{call.input.softmax_scale} * std::numbers::log2e);
  for (std::int64_t r = 0; r < m; ++r) {
    const std::int64_t row = first_row + (r < rows ? r : rows - 1);  // padding: the last row's limit, q = 0
    const std::int64_t token = row / heads;
    const std::int64_t sees = std::int64_t{unit.past_tokens} + unit.causal_shift + token + 1;
    tile.limit[r] = sees < unit.list_tokens ? static_cast<std::int32_t>(sees) : unit.list_tokens;
    // Padding is never nearer to its maximum than a real row: it cannot keep a block from being skipped.
    tile.row_max[r] = r < rows ? std::numeric_limits<float>::lowest() : std::numeric_limits<float>::max();
    tile.row_sum[r] = 0;
    const float* q = call.input.q.row(unit.q_begin + static_cast<std::int32_t>(token),
                                      unit.q_head + static_cast<std::int32_t>(row % heads));
    for (std::int64_t i = 0; i < head_dim; ++i) tile.qt[i * m + r] = r < rows ? q[i] * scale : 0.0F;
  }
  for (std::int64_t i = 0; i < head_dim * m; ++i) tile.ot[i] = 0;
  tile.least_limit = tile.limit[0];
  tile.most_limit = tile.limit[rows - 1];
}

void finish_tile(const Call& call, const AttentionUnit& unit, const Tile& tile) {
  const std::int64_t m = tile.vectors * static_cast<std::int64_t>(hn::Lanes(DF()));
  const std::int64_t head_dim = call.input.q.head_dim;
  const std::int32_t heads = call.input.heads_per_unit;
  for (std::int32_t r = 0; r < tile.rows; ++r) {
    const std::int64_t row = tile.first_row + r;
    const std::int32_t token = unit.q_begin + static_cast<std::int32_t>(row / heads);
    const std::int32_t head = unit.q_head + static_cast<std::int32_t>(row % heads);
    const float sum = tile.row_sum[r];
    const float inverse = sum == 0 ? 0.0F : 1.0F / sum;
    float* o = call.output.o.row(token, head);
    for (std::int64_t i = 0; i < head_dim; ++i) o[i] = tile.ot[i * m + r] * inverse;
    if (call.output.lse == nullptr) continue;
    const double lse = double{tile.row_max[r]} * std::numbers::ln2 + std::log(double{sum});
    call.output.lse[std::int64_t{token} * call.input.q.heads + head] =
        sum == 0 ? -std::numeric_limits<float>::infinity() : static_cast<float>(lse);
  }
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
                  bool stage, const Scratch& scratch) {
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
                  const Scratch& scratch) {
  const MeanCorrection& correction = call.input.correction;
  for (std::int32_t key = 0; key < num_keys; ++key) {
    const std::int64_t page = correction.dropped_ids[static_cast<std::size_t>(first_entry + key)];
    const std::int64_t at = (page * call.input.kv.num_kv_heads + unit.kv_head) * call.input.kv.head_dim;
    scratch.k_rows[key] = correction.mean_k + at;
    scratch.v_rows[key] = correction.mean_v + at;
  }
  for (std::int32_t key = num_keys; key % kBroadcasts != 0; ++key) scratch.k_rows[key] = scratch.k_rows[num_keys - 1];
}

void step_tile(const Call& call, const Tile& tile, const KeyBlock& block, Scratch& scratch) {
  const auto step = tile.vectors == 1 ? tile_step<1> : tile.vectors == 2 ? tile_step<2> : tile_step<kVectors>;
  const bool done = step(tile, call.input.q.head_dim, block, call.log2_lambda, scratch.scores);
  ++scratch.skip_count.steps;
  scratch.skip_count.skipped += done ? 0 : 1;
}

void attend_item(const Call& call, const Item& item, Scratch& scratch) {
  const AttentionUnit& unit = call.input.units[static_cast<std::size_t>(item.unit)];
  const std::int64_t head_dim = call.input.q.head_dim;
  Tile tiles[kMaxTilesPerItem];
  std::int32_t num_tiles = 0;
  for (std::int64_t row = 0; row < item.num_rows; row += call.tile_rows, ++num_tiles) {
    const std::int64_t rows = item.num_rows - row < call.tile_rows ? item.num_rows - row : call.tile_rows;
    start_tile(call, unit, item.first_row + row, rows,
               scratch.tiles + num_tiles * tile_floats(head_dim, call.tile_rows), tiles[num_tiles]);
  }

  // Values are the same staged or not. A single tile would read each strided row twice at most: not worth a copy.
  const bool stage = call.stage && (num_tiles > 1 || call.input.kv.dtype != DType::kF32);
  const std::int32_t end = tiles[num_tiles - 1].most_limit;
  for (std::int32_t first_key = 0; first_key < end; first_key += kKeyBlock) {
    const std::int32_t num_keys = end - first_key < kKeyBlock ? end - first_key : kKeyBlock;
    locate_block(call, unit, first_key, num_keys, stage, scratch);
    KeyBlock block{.k_rows = scratch.k_rows, .v_rows = scratch.v_rows, .first_key = first_key};
    for (std::int32_t t = 0; t < num_tiles; ++t) {
      const std::int32_t left = tiles[t].most_limit - first_key;
      block.num_keys = left < num_keys ? left : num_keys;
      if (block.num_keys > 0) step_tile(call, tiles[t], block, scratch);
    }
  }
  if (!call.input.correction.dropped.empty()) {
    const DroppedPages dropped = call.input.correction.dropped[static_cast<std::size_t>(item.unit)];
    for (std::int32_t first = 0; first < dropped.count; first += kKeyBlock) {
      KeyBlock block{.k_rows = scratch.k_rows, .v_rows = scratch.v_rows, .bias = call.log2_page_tokens};
      block.may_hide = false;
      block.num_keys = dropped.count - first < kKeyBlock ? dropped.count - first : kKeyBlock;
      locate_means(call, unit, dropped.begin + first, block.num_keys, scratch);
      for (std::int32_t t = 0; t < num_tiles; ++t) step_tile(call, tiles[t], block, scratch);
    }
  }
  for (std::int32_t t = 0; t < num_tiles; ++t) finish_tile(call, unit, tiles[t]);
}

}  // namespace HWY_NAMESPACE
}  // namespace compact::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace compact {
namespace cpu {
HWY_EXPORT(target_name);
HWY_EXPORT(max_tile_rows);
HWY_EXPORT(attend_item);
namespace {

constexpr std::size_t kAlignment = 64;

struct AlignedDelete {
  void operator()(float* data) const { ::operator delete (data, std::align_val_t{kAlignment}); }
};
using AlignedFloats = std::unique_ptr<float, AlignedDelete>;

AlignedFloats allocate_floats(std::int64_t count) {
  return AlignedFloats(static_cast<float*>(
      ::operator new (static_cast<std::size_t>(count) * sizeof(float), std::align_val_t{kAlignment})));
}

// Row tiles of every unit, dearest first so that the last items to finish are short.
std::vector<Item> plan_items(const Call& call) {
  std::vector<Item> items;
  const std::int64_t item_rows = std::int64_t{call.tile_rows} * call.tiles_per_item;
  for (std::size_t u = 0; u < call.input.units.size(); ++u) {
    const AttentionUnit& unit = call.input.units[u];
    const std::int64_t rows = std::int64_t{unit.q_len} * call.input.heads_per_unit;
    for (std::int64_t row = 0; row < rows; row += item_rows) {
      Item item{.unit = static_cast<std::int32_t>(u), .first_row = row, .num_rows = std::min(item_rows, rows - row)};
      const std::int64_t last_token = (row + item.num_rows - 1) / call.input.heads_per_unit;
      item.cost = item.num_rows * std::min<std::int64_t>(unit.list_tokens, std::int64_t{unit.past_tokens} +
                                                                               unit.causal_shift + last_token + 1);
      items.push_back(item);
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  return items;
}

std::int64_t scratch_floats(const Call& call) {
  const std::int64_t head_dim = call.input.q.head_dim;
  constexpr std::int64_t kFloatsPerPointer = sizeof(void*) / sizeof(float);
  const std::int64_t pointers = 2 * kKeyBlock * kFloatsPerPointer;
  return call.tiles_per_item * tile_floats(head_dim, call.tile_rows) + kKeyBlock * std::int64_t{call.tile_rows} +
         (call.stage ? 2 * kKeyBlock * head_dim : 0) + pointers;
}

Scratch carve_scratch(const Call& call, float* at) {
  const std::int64_t head_dim = call.input.q.head_dim;
  Scratch scratch;
  scratch.k_rows = reinterpret_cast<const float**>(at);
  scratch.v_rows = scratch.k_rows + kKeyBlock;
  at = reinterpret_cast<float*>(scratch.v_rows + kKeyBlock);
  scratch.scores = at;
  at += kKeyBlock * std::int64_t{call.tile_rows};
  scratch.tiles = at;
  at += call.tiles_per_item * tile_floats(head_dim, call.tile_rows);
  if (call.stage) {
    scratch.staged_k = at;
    scratch.staged_v = at + kKeyBlock * head_dim;
  }
  return scratch;
}

}  // namespace
}  // namespace cpu

const char* cpu_attention_target() noexcept { return HWY_DYNAMIC_DISPATCH(cpu::target_name)(); }

Status attend_cpu(const AttentionInput& input, const AttentionOutput& output, ThreadPool& pool) try {
  CA_RETURN_IF_ERROR(validate_attention(input, output));
  cpu::Call call{.input = input, .output = output};
  call.log2_lambda = std::log2(input.skip_lambda);  // -inf if off: no difference lies below
  call.log2_page_tokens = std::log2(static_cast<float>(input.kv.page_tokens));
  call.tile_rows = HWY_DYNAMIC_DISPATCH(cpu::max_tile_rows)();
  call.stage = input.kv.dtype != DType::kF32 || input.kv.token_stride != input.kv.head_dim;
  call.tiles_per_item = cpu::kMaxTilesPerItem;
  std::vector<cpu::Item> items = cpu::plan_items(call);
  // Fewer tiles to an item where there are too few items to keep every thread busy to the end.
  const std::int32_t threads = pool.num_threads();
  while (threads > 1 && call.tiles_per_item > 1 && items.size() < 4 * static_cast<std::size_t>(threads)) {
    call.tiles_per_item /= 2;
    items = cpu::plan_items(call);
  }

  const std::int64_t floats = cpu::scratch_floats(call);
  std::vector<cpu::AlignedFloats> memory;
  std::vector<cpu::Scratch> scratch;
  for (std::int32_t thread = 0; thread < threads; ++thread) {
    memory.push_back(cpu::allocate_floats(floats));
    scratch.push_back(cpu::carve_scratch(call, memory.back().get()));
  }
  const auto attend_item = HWY_DYNAMIC_DISPATCH(cpu::attend_item);
  pool.parallel_for(static_cast<std::int64_t>(items.size()), [&](std::int64_t item, std::int32_t thread) {
    attend_item(call, items[static_cast<std::size_t>(item)], scratch[static_cast<std::size_t>(thread)]);
  });
  if (output.skip_count != nullptr) {
    *output.skip_count = {};
    for (const cpu::Scratch& one : scratch) {
      output.skip_count->steps += one.skip_count.steps;
      output.skip_count->skipped += one.skip_count.skipped;
    }
  }
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory("attention: no memory for the scratch of the CPU kernel");
}

}  // namespace compact
#endif  // HWY_ONCE
