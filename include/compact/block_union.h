/// Union: from block masks to page lists.
///
/// A unit is (request, KV head or a sub-group of its query heads, span of consecutive query tokens); all its rows read
/// one list of pages, the union of what they want. Source: CompactAttention, arXiv 2605.16839; docs/design/method.md
/// section 5.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "compact/attention_unit.h"
#include "compact/selector.h"
#include "compact/status.h"
#include "compact/tensor_view.h"
#include "compact/thread_pool.h"

namespace compact {

/// Pages every unit reads, whatever the selector says. In tokens, rounded up to pages (docs/design/method.md section
/// 4).
struct ForcedPages {
  std::int32_t sink_tokens = 256;
  std::int32_t window_tokens = 512;  // counted back from each query block's first page, that page included
};

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

struct PageLists {
  std::int32_t heads_per_unit = 1;     // divides G; the same for every unit
  std::vector<AttentionUnit> units;    // [U]  chunk by chunk, then KV head, then sub-group
  std::vector<std::int32_t> page_ids;  // [sum of list pages]  physical ids, ascending in logical position within a list
  std::vector<std::int32_t> logical_pages;  // [the same]  logical page of each entry, for reports and tests
  std::vector<UnionStats> chunk_stats;      // [B]
};

struct UnionInput {
  std::span<const ChunkView> chunks;    // [B]
  std::int32_t num_q_heads = 0;         // Hq
  std::int32_t num_kv_heads = 0;        // Hkv
  std::int32_t page_tokens = 0;         // P
  std::int32_t num_physical_pages = 0;  // bound for the page tables
  ForcedPages forced;
  std::int32_t heads_per_unit = 0;  // 0: default_heads_per_unit(G)
};

/// All heads of a KV head share a list up to G = 4; above, sub-groups of the largest divisor of G in 2..4. Without one
/// (G = 5, 7, 25) all G share: a list per query head would give up the method.
[[nodiscard]] std::int32_t default_heads_per_unit(std::int32_t group) noexcept;

/// Mode `paper`: one list per (chunk, KV head or sub-group): the OR of the mask rows of every query block and head,
/// forced pages and all pages of the chunk. Pages ascend, the chunk's are complete and last. mask.mask_heads must be Hq
/// or Hkv. Errors: kInvalidArgument (shapes, a page table entry outside the cache).
[[nodiscard]] Status build_page_lists(const UnionInput& input, const BlockMask& mask, PageLists& lists,
                                      ThreadPool& pool);

/// The lists of dense attention: every page, for every chunk. Needs no mask.
[[nodiscard]] Status build_dense_lists(const UnionInput& input, PageLists& lists);

}  // namespace compact
