/// What one item of the CPU backend owns, and how its kernels are called. Shared by all kernels and instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "compact/attention.h"

namespace compact::cpu {

struct Bf16Product;

/// Packed row r of a unit is (token r / heads_per_unit, head r % heads_per_unit).
struct Item {
  std::int32_t unit = 0;
  std::int64_t first_row = 0;  // packed
  std::int64_t num_rows = 0;
  std::int32_t first_key = 0;  // list coordinates [first_key, end_key), where a list is split
  std::int32_t end_key = 0;
  bool last_keys = true;      // this item adds the means of dropped pages
  std::int64_t partial = -1;  // first row of its part in Call::partial_*; -1: it writes the result
  std::int64_t cost = 0;
};

/// All items of a call see this.
struct Call {
  AttentionInput input;
  AttentionOutput output;
  const Bf16Product* product = nullptr;  // of the bf16 kernel
  std::int32_t tiles_per_item = 0;
  float log2_lambda = 0;         // of skip-softmax
  float log2_page_tokens = 0;    // what a mean of a dropped page counts for
  float* partial_o = nullptr;    // [rows of split units x parts, D]  normalised
  float* partial_lse = nullptr;  // [rows of split units x parts]
};

/// One way to compute items, for the instruction set of this machine.
struct Kernel {
  std::int32_t tile_rows = 0;       // packed rows of a tile
  std::int32_t tiles_per_item = 0;  // at most: tiles that share a walk over the list
  std::int64_t (*scratch_bytes)(const Call& call) = nullptr;
  /// `scratch` is 64-byte aligned and the thread's own. Steps are added to `count`.
  void (*attend)(const Call& call, const Item& item, std::byte* scratch, SkipCount& count) = nullptr;
};

[[nodiscard]] Kernel f32_kernel();       // any cache; scores and sums in fp32
[[nodiscard]] Kernel bf16_kernel();      // bf16 caches; Call::product multiplies
[[nodiscard]] Kernel few_rows_kernel();  // items of at most kFewRows rows; memory-bound

/// Units of so few rows are read along D, one item per kSplitKeys keys (multiple of the kernels' key blocks).
inline constexpr std::int64_t kFewRows = 8;
inline constexpr std::int32_t kSplitKeys = 2048;

}  // namespace compact::cpu
