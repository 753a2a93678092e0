/// The mean-key rule, shared by its reference and its CPU form (docs/design/method.md 3.5; FlashPrefill, arXiv
/// 2603.06199, and v2, arXiv 2608.19758).
///
///   a[r,j]   = s * q_r . mean_k[j]                     r = (token, head) of the tile, page j visible to r
///   row norm:  E[j] = mean over r of exp(a[r,j]) / sum over visible j' of exp(a[r,j'])
///   tile norm: E[j] = sum over r of exp(a[r,j] - M)    M = max over the tile
///   vote max:  the maximum over r in place of mean or sum
///   keep past page j  iff  E[j] >= threshold           threshold = max(share, lift / n), n scored pages,
///                                                      or alpha * max over all scored pages of E
///
/// Scored are the complete pages that end at or before the tile's last query (visible `full`: before its first). Those
/// of the chunk itself (boundary page included) take part in sums and maxima, never in the mask. Rows that see no page
/// drop out. A row with a NaN or +inf score, or without a finite one, keeps all its pages and is counted.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "compact/selector.h"
#include "src/select/select_rows.h"

namespace compact {

/// Bq: 128 rows a tile, within a page.
[[nodiscard]] std::int32_t mean_key_block_tokens(TileShape tile, std::int32_t group, std::int32_t page_tokens) noexcept;

[[nodiscard]] Status check_mean_key_options(const MeanKeyOptions& options, const Budget& budget);

/// Shapes, page tables, and that every past page has a summary of exactly P tokens.
[[nodiscard]] Status check_mean_key_input(const SelectInput& input);

/// The share or alpha that the rule uses, whichever it is; <= 0 keeps every past page, underflowed scores included.
[[nodiscard]] constexpr float mean_key_setting(const MeanKeyOptions& options) noexcept {
  return options.alpha >= 0 ? options.alpha : options.share;
}

/// Rows (t, h) that vote together: the tokens of one query block times one query head, or all heads of a KV head.
struct MeanKeyTile {
  std::int32_t kv_head = 0;
  std::int32_t q_head = 0;                 // first query head
  std::int32_t heads = 0;                  // query heads; row r is token r / heads, head q_head + r % heads
  std::int32_t rows = 0;                   // tokens x heads
  std::int32_t past_pages = 0;             // Np
  std::vector<std::int32_t> scored_pages;  // [n]     logical pages, ascending; 0..Np-1 come first
  std::vector<std::int32_t> visible;       // [rows]  scored pages that the row sees: scored_pages[0, visible[r])
};

/// An empty mask of the rule's shape. Returns the query heads that share a row.
[[nodiscard]] std::int32_t reset_mean_key_mask(const SelectInput& input, const MeanKeyOptions& options,
                                               BlockMask& mask);

/// Threshold of a tile whose scored pages have these energies, for a share or alpha of `value`; scores [Np] = those of
/// the past pages. The mass elsewhere is that of the chunk's scored pages.
[[nodiscard]] RowVerdict judge_mean_key(const MeanKeyOptions& options, float value, std::span<const float> energy,
                                        std::int32_t past_pages, std::span<float> scores);

/// The tile of (mask head, query block). `tile` keeps its memory from call to call.
void make_mean_key_tile(const SelectInput& input, const MeanKeyOptions& options, const QueryBlock& block,
                        std::int32_t mask_head, MeanKeyTile& tile);

/// Readable reference: loops over rows and pages, fp64 accumulation, fp32 comparison.
///
/// energies, margins  [mask_heads, query blocks, 64 * words_per_row] or null: E[j] and E[j] / threshold - 1 of past
/// pages;
///                    NaN where nothing was compared (keep-all settings, rows with non-finite scores, j >= Np)
[[nodiscard]] Status select_mean_key_reference(const SelectInput& input, const MeanKeyOptions& options, BlockMask& mask,
                                               std::vector<double>* energies = nullptr,
                                               std::vector<double>* margins = nullptr, const Budget& budget = {},
                                               const HeadThresholds& thresholds = {});

/// CPU form: fp32, SIMD by run-time dispatch, threads over (mask head, query block). Same decisions as the reference
/// where |margin| > 1e-4, and the same bits for any number of threads and any chunking that does not cut the tile.
[[nodiscard]] Status select_mean_key_cpu(const SelectInput& input, const MeanKeyOptions& options, BlockMask& mask,
                                         ThreadPool& pool, const Budget& budget = {},
                                         const HeadThresholds& thresholds = {});

}  // namespace compact
