/// Union: from block masks to page lists.
///
/// A unit is (request, KV head or a sub-group of its query heads, span of consecutive query tokens); all its rows read
/// one list of pages, the union of what they want. Source: CompactAttention, arXiv 2605.16839; docs/design/method.md
/// section 5.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "compact/attention_unit.h"
#include "compact/selector.h"
#include "compact/status.h"
#include "compact/tensor_view.h"
#include "compact/thread_pool.h"

namespace compact {

/// Sums behind density and union inflation (docs/design/method.md 1.3), weighted by rows = tokens x query heads. Chunk
/// pages do not count: density is about what may be dropped.
struct UnionStats {
  std::int64_t listed_row_pages = 0;   // sum over units of rows * past pages in the list
  std::int64_t wanted_row_pages = 0;   // the same before the union: per (query head, query block), forced included
  std::int64_t visible_row_pages = 0;  // sum of rows * Np

  /// Share of past pages read; 1 when there is no past.
  [[nodiscard]] double density() const noexcept {
    return visible_row_pages == 0 ? 1.0
                                  : static_cast<double>(listed_row_pages) / static_cast<double>(visible_row_pages);
  }
  /// Density after / before the union; 1 when nothing was wanted.
  [[nodiscard]] double union_inflation() const noexcept {
    return wanted_row_pages == 0 ? 1.0 : static_cast<double>(listed_row_pages) / static_cast<double>(wanted_row_pages);
  }
  void add(const UnionStats& other) noexcept {
    listed_row_pages += other.listed_row_pages;
    wanted_row_pages += other.wanted_row_pages;
    visible_row_pages += other.visible_row_pages;
  }
};

/// Which query rows share a page list (docs/design/method.md 5.2). Spans are cut at absolute multiples of their length.
enum class UnionMode : std::int32_t {
  kPaper = 0,     ///< the whole chunk, as published
  kSpan = 1,      ///< UnionOptions::span_tokens query tokens
  kTile = 2,      ///< 128 packed rows: the least that a kernel tile can share
  kAdaptive = 3,  ///< neighbouring tiles, merged while the cost model gains
};
[[nodiscard]] const char* union_mode_name(UnionMode mode) noexcept;
/// Errors: kInvalidArgument for an unknown name (lists the known).
[[nodiscard]] Result<UnionMode> union_mode_from_name(std::string_view name);

/// What a backend pays for a unit, in 1/1024 of a tile step: one M-tile (128 packed rows) against 128 list tokens.
/// Integers, so that every machine forms the same units (docs/design/method.md 5.3).
struct CostModel {
  std::int64_t tile = 1024;      // a tile step
  std::int64_t m_tile = 2048;    // once per M-tile: load Q, normalise, store O
  std::int64_t list_tile = 358;  // once per unit and 128 list tokens: bring K and V near the core
  std::int64_t unit = 1024;      // once per unit
};

/// Cost of one unit. A page of P tokens counts P/128 of a list tile; an M-tile holds 128 / hpt tokens of hpt heads, hpt
/// = largest power of two that divides heads_per_unit.
[[nodiscard]] std::int64_t unit_cost(const CostModel& cost, std::int32_t q_len, std::int32_t heads_per_unit,
                                     std::int32_t list_pages, std::int32_t page_tokens) noexcept;

/// UnionOptions::heads_per_unit: take the divisor of G that costs least over the step.
inline constexpr std::int32_t kCheapestHeads = -1;

struct UnionOptions {
  UnionMode mode = UnionMode::kPaper;
  /// Query heads that share a list, the same for every unit of a step: a divisor of G; 0: default_heads_per_unit(G) for
  /// kPaper and kSpan, G for kTile and kAdaptive. kCheapestHeads is for kAdaptive; it looks at the whole step, so the
  /// shards of a tensor-parallel model may choose differently.
  std::int32_t heads_per_unit = 0;
  std::int32_t span_tokens = 0;  // of kSpan, 1 or more
  /// kAdaptive: no merge makes a unit's inflation exceed this / 1024; 0: no bound.
  std::int32_t max_inflation_1024ths = 0;
  bool list_dropped = false;  // fill PageLists::dropped
  CostModel cost{};           // kAdaptive and the crossover to dense
};

/// Past pages that a unit's list leaves out, for the mean correction (attention.h).
struct DroppedPages {
  std::int32_t begin = 0;  // first entry in dropped_ids
  std::int32_t count = 0;
};

struct PageLists {
  std::int32_t heads_per_unit = 1;     // divides G; the same for every unit
  std::vector<AttentionUnit> units;    // [U]  chunk by chunk, then KV head, then sub-group, then span, ascending
  std::vector<std::int32_t> page_ids;  // [sum of list pages]  physical ids, ascending in logical position within a list
                                       // unless UnionInput::page_priority orders the past ones
  std::vector<std::int32_t> logical_pages;  // [the same]  logical page of each entry, for reports and tests
  std::vector<DroppedPages> dropped;        // [U] with UnionOptions::list_dropped, else empty
  std::vector<std::int32_t> dropped_ids;    // [num_dropped]  physical ids, ascending in logical position within a unit
  std::vector<UnionStats> chunk_stats;      // [B]
};

struct UnionInput {
  std::span<const ChunkView> chunks;    // [B]
  std::int32_t num_q_heads = 0;         // Hq
  std::int32_t num_kv_heads = 0;        // Hkv
  std::int32_t page_tokens = 0;         // P
  std::int32_t num_physical_pages = 0;  // bound for the page tables
  ForcedPages forced;
  UnionOptions options{};
  /// Empty, or how early each wanted page should be read: [mask_heads, num_blocks, 64 * words_per_row of the mask], 255
  /// first. The past pages of a list then stand by the largest priority that a member row gives them, ties ascending;
  /// forced pages count as 255. For skip-softmax, whose running maximum should converge early; ascending order is what
  /// caches like.
  std::span<const std::uint8_t> page_priority{};
};

/// Up to G = 4 all heads of a KV head share a list; above, sub-groups of the largest divisor of G in 2..4. Without one
/// (G = 5, 7, 25) all G share: a list per query head would give up the method.
[[nodiscard]] std::int32_t default_heads_per_unit(std::int32_t group) noexcept;

/// The page list of every unit: the OR of the mask rows of its query blocks and heads, forced pages, and all pages of
/// the chunk. Pages ascend, the chunk's are complete and last. mask.mask_heads must be Hq or Hkv; a span inside a query
/// block inherits the block's row. Same input, same lists, for any number of threads.
/// Errors: kInvalidArgument (shapes, options, a page table entry outside the cache).
[[nodiscard]] Status build_page_lists(const UnionInput& input, const BlockMask& mask, PageLists& lists,
                                      ThreadPool& pool);

/// The lists of dense attention: every page, one unit per chunk and KV head or sub-group. Needs no mask.
[[nodiscard]] Status build_dense_lists(const UnionInput& input, PageLists& lists);

}  // namespace compact
