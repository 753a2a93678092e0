// CPU attention over page lists: which kernel, which items, on which threads.
//
// An item is a few consecutive row tiles of one unit, or, for units of few rows, a part of the unit's list. It owns its
// rows of O and LSE, or its partial result; nothing is shared between items. What an item is depends on the unit alone,
// and a row's arithmetic on neither its neighbours nor the grouping of tiles: bits do not depend on the number of
// threads.
#include "compact/attention.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "src/attention/cpu/bf16_product.h"
#include "src/attention/cpu/cpu_attention.h"
#include "src/attention/cpu/item.h"
#include "src/attention/merge.h"
#include "src/attention/validate.h"

namespace compact {
namespace cpu {
namespace {

constexpr std::int64_t kAlignment = 64;

struct AlignedDelete {
  void operator()(std::byte* data) const { ::operator delete (data, std::align_val_t{kAlignment}); }
};
using AlignedBytes = std::unique_ptr<std::byte, AlignedDelete>;

AlignedBytes allocate(std::int64_t bytes) {
  return AlignedBytes(
      static_cast<std::byte*>(::operator new (static_cast<std::size_t>(bytes), std::align_val_t{kAlignment})));
}

std::int64_t rows_of(const Call& call, const AttentionUnit& unit) {
  return std::int64_t{unit.q_len} * call.input.heads_per_unit;
}

// Keys that packed row `row` sees.
std::int64_t keys_of(const Call& call, const AttentionUnit& unit, std::int64_t row) {
  const std::int64_t seen = std::int64_t{unit.past_tokens} + unit.causal_shift + row / call.input.heads_per_unit + 1;
  return std::min<std::int64_t>(unit.list_tokens, seen);
}

// A unit of few rows whose list was split: parts [first_item, first_item + num_parts) in list order.
struct SplitUnit {
  std::int32_t unit = 0;
  std::int64_t first_partial = 0;
  std::int32_t num_parts = 0;
};

struct Plan {
  std::vector<Item> tile_items;
  std::vector<Item> few_items;
  std::vector<SplitUnit> splits;
  std::int64_t partial_rows = 0;
};

void plan_tiles(const Call& call, std::int32_t u, std::int64_t item_rows, Plan& plan) {
  const AttentionUnit& unit = call.input.units[static_cast<std::size_t>(u)];
  const std::int64_t rows = rows_of(call, unit);
  for (std::int64_t row = 0; row < rows; row += item_rows) {
    Item item{.unit = u, .first_row = row, .num_rows = std::min(item_rows, rows - row)};
    item.cost = item.num_rows * keys_of(call, unit, row + item.num_rows - 1);
    plan.tile_items.push_back(item);
  }
}

void plan_few_rows(const Call& call, std::int32_t u, Plan& plan) {
  constexpr std::int64_t kCostOfAKey = 16;  // in keys of a row of a tile: what reading a key costs, however few rows
  const AttentionUnit& unit = call.input.units[static_cast<std::size_t>(u)];
  const std::int64_t rows = rows_of(call, unit);
  const auto end_key = static_cast<std::int32_t>(keys_of(call, unit, rows - 1));
  const std::int32_t parts = std::max(1, (end_key + kSplitKeys - 1) / kSplitKeys);
  if (parts > 1) plan.splits.push_back({u, plan.partial_rows, parts});
  for (std::int32_t part = 0; part < parts; ++part) {
    Item item{.unit = u, .num_rows = rows, .first_key = part * kSplitKeys};
    item.end_key = std::min(end_key, item.first_key + kSplitKeys);
    item.last_keys = part + 1 == parts;
    item.partial = parts > 1 ? plan.partial_rows + part * rows : -1;
    item.cost = kCostOfAKey * (item.end_key - item.first_key);
    plan.few_items.push_back(item);
  }
  if (parts > 1) plan.partial_rows += parts * rows;
}

// Fewer tiles to an item where there are too few items to keep every thread busy to the end. Dearest first, so that the
// last items to finish are short.
Plan plan_items(Call& call, const Kernel& tiles, std::int32_t num_threads) {
  const auto plan_with = [&](std::int32_t tiles_per_item) {
    Plan plan;
    for (std::int32_t u = 0; u < static_cast<std::int32_t>(call.input.units.size()); ++u) {
      const std::int64_t rows = rows_of(call, call.input.units[static_cast<std::size_t>(u)]);
      if (rows > kFewRows) plan_tiles(call, u, std::int64_t{tiles.tile_rows} * tiles_per_item, plan);
      if (rows > 0 && rows <= kFewRows) plan_few_rows(call, u, plan);
    }
    return plan;
  };
  call.tiles_per_item = tiles.tiles_per_item;
  Plan plan = plan_with(call.tiles_per_item);
  while (num_threads > 1 && call.tiles_per_item > 1 &&
         plan.tile_items.size() < 4 * static_cast<std::size_t>(num_threads)) {
    call.tiles_per_item /= 2;
    plan = plan_with(call.tiles_per_item);
  }
  const auto dearer = [](const Item& a, const Item& b) { return a.cost > b.cost; };
  std::stable_sort(plan.tile_items.begin(), plan.tile_items.end(), dearer);
  std::stable_sort(plan.few_items.begin(), plan.few_items.end(), dearer);
  return plan;
}

// Joins the parts of a split unit in list order.
void merge_parts(const Call& call, const SplitUnit& split) {
  const AttentionUnit& unit = call.input.units[static_cast<std::size_t>(split.unit)];
  const std::int64_t rows = rows_of(call, unit);
  const std::int64_t head_dim = call.input.q.head_dim;
  std::vector<PartialRow> parts(static_cast<std::size_t>(split.num_parts));
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int32_t part = 0; part < split.num_parts; ++part) {
      const std::int64_t at = split.first_partial + part * rows + r;
      parts[static_cast<std::size_t>(part)] = {call.partial_o + at * head_dim, call.partial_lse[at]};
    }
    const std::int32_t token = unit.q_begin + static_cast<std::int32_t>(r / call.input.heads_per_unit);
    const std::int32_t head = unit.q_head + static_cast<std::int32_t>(r % call.input.heads_per_unit);
    const float lse = merge_row(parts, call.input.q.head_dim, call.output.o.row(token, head));
    if (call.output.lse != nullptr) call.output.lse[std::int64_t{token} * call.input.q.heads + head] = lse;
  }
}

}  // namespace

Status attend_cpu_with(const Bf16Product* product, const AttentionInput& input, const AttentionOutput& output,
                       ThreadPool& pool) try {
  CA_RETURN_IF_ERROR(validate_attention(input, output));
  if (product != nullptr && input.kv.dtype != DType::kBF16) {
    return invalid_argument(fmt::format("attention: kernel {} and a cache of {}; it needs bf16", product->name,
                                        dtype_name(input.kv.dtype)));
  }
  Call call{.input = input, .output = output, .product = product};
  call.log2_lambda = std::log2(input.skip_lambda);  // -inf if off: no difference lies below
  call.log2_page_tokens = std::log2(static_cast<float>(input.kv.page_tokens));
  const Kernel tiles = product == nullptr ? f32_kernel() : bf16_kernel();
  const Kernel few = few_rows_kernel();
  const Plan plan = plan_items(call, tiles, pool.num_threads());
  std::vector<float> partial_o(static_cast<std::size_t>(plan.partial_rows * input.q.head_dim));
  std::vector<float> partial_lse(static_cast<std::size_t>(plan.partial_rows));
  call.partial_o = partial_o.data();
  call.partial_lse = partial_lse.data();

  const std::int64_t bytes = std::max(tiles.scratch_bytes(call), few.scratch_bytes(call));
  std::vector<AlignedBytes> scratch;
  std::vector<SkipCount> counts(static_cast<std::size_t>(pool.num_threads()));
  for (std::int32_t thread = 0; thread < pool.num_threads(); ++thread) scratch.push_back(allocate(bytes));
  const auto num_tile_items = static_cast<std::int64_t>(plan.tile_items.size());
  const auto num_items = num_tile_items + static_cast<std::int64_t>(plan.few_items.size());
  pool.parallel_for(num_items, [&](std::int64_t i, std::int32_t thread) {
    const auto at = static_cast<std::size_t>(thread);
    if (i < num_tile_items) {
      tiles.attend(call, plan.tile_items[static_cast<std::size_t>(i)], scratch[at].get(), counts[at]);
    } else {
      few.attend(call, plan.few_items[static_cast<std::size_t>(i - num_tile_items)], scratch[at].get(), counts[at]);
    }
  });
  pool.parallel_for(static_cast<std::int64_t>(plan.splits.size()),
                    [&](std::int64_t i, std::int32_t) { merge_parts(call, plan.splits[static_cast<std::size_t>(i)]); });
  if (output.skip_count != nullptr) {
    *output.skip_count = {};
    for (const SkipCount& count : counts) {
      output.skip_count->steps += count.steps;
      output.skip_count->skipped += count.skipped;
    }
  }
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory("attention: no memory for the scratch of the CPU kernel");
}

}  // namespace cpu

const char* cpu_kernel_name(CpuKernel kernel) noexcept {
  switch (kernel) {
    case CpuKernel::kAuto: return "auto";
    case CpuKernel::kF32: return "f32";
    case CpuKernel::kBf16Dot: return "avx512_bf16";
    case CpuKernel::kBf16Amx: return "amx_bf16";
  }
  return "unknown";
}

bool cpu_kernel_available(CpuKernel kernel) noexcept {
  switch (kernel) {
    case CpuKernel::kAuto:
    case CpuKernel::kF32: return true;
    case CpuKernel::kBf16Dot: return cpu::dot_product() != nullptr;
    case CpuKernel::kBf16Amx: return cpu::amx_product() != nullptr;
  }
  return false;
}

CpuKernel best_cpu_kernel(DType dtype) noexcept {
  for (const CpuKernel kernel : {CpuKernel::kBf16Amx, CpuKernel::kBf16Dot}) {
    if (dtype == DType::kBF16 && cpu_kernel_available(kernel)) return kernel;
  }
  return CpuKernel::kF32;
}

CostModel cpu_cost_model(CpuKernel /*kernel*/) noexcept {
  return {.tile = 1024, .m_tile = 348, .list_tile = 216, .unit = 327};
}

Status attend_cpu(const AttentionInput& input, const AttentionOutput& output, ThreadPool& pool, CpuKernel kernel) {
  if (kernel == CpuKernel::kAuto) kernel = best_cpu_kernel(input.kv.dtype);
  const cpu::Bf16Product* product = nullptr;
  if (kernel == CpuKernel::kBf16Dot) product = cpu::dot_product();
  if (kernel == CpuKernel::kBf16Amx) product = cpu::amx_product();
  if (kernel != CpuKernel::kF32 && product == nullptr) {
    return unsupported(fmt::format("attention: this machine has no {}; allowed here: auto, f32{}",
                                   cpu_kernel_name(kernel),
                                   cpu_kernel_available(CpuKernel::kBf16Dot) ? ", avx512_bf16" : ""));
  }
  return cpu::attend_cpu_with(product, input, output, pool);
}

}  // namespace compact
