/// The sub-mean rule, shared by its reference and its CPU form (docs/design/method.md 3.10; our own).
///
///   l[r,u]  = temperature * s * q_r . sub_mean_k[u]     r = (token, head) of a packed tile, granule u visible to r
///   p[r,j]  = sum over the granules u of page j of exp(l[r,u]) / sum over all visible granules of exp(l[r,.])
///   E[j]    = mean over r of p[r,j]  +  peak_weight * max over r of p[r,j]
///   keep past page j  iff  E[j] >= max(share, lift / n)                 n: pages scored
///                     or   coherence[j] < min_coherence                 options, off by default
///                     or   a probe row has probe_mass of its exact attention in page j
///
/// A granule is visible to a row that stands at or after its last token; granules of the chunk itself take part in the
/// sums, never in the mask. Rows that see no granule drop out. A row with a NaN or +inf score, or without a finite one,
/// keeps all its pages and is counted.
///
/// The softmax is over the means alone, although the row's own neighbourhood could be weighed exactly: a mean
/// understates the mass of a page with one strong key, and next to exact local mass such pages would vanish.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "compact/selector.h"
#include "src/select/select_rows.h"

namespace compact {

[[nodiscard]] Status check_sub_mean_options(const SubMeanOptions& options);
[[nodiscard]] SelectorNeeds sub_mean_needs(const SubMeanOptions& options);
[[nodiscard]] Status check_sub_mean_input(const SelectInput& input, const SubMeanOptions& options);

/// What kNative compares with for the options' share: 0 where share and lift are both off.
[[nodiscard]] float sub_mean_setting(const SubMeanOptions& options) noexcept;

/// An empty mask, one row for each KV head and query block. Returns G.
[[nodiscard]] std::int32_t reset_sub_mean_mask(const SelectInput& input, BlockMask& mask);

/// Rows (t, h) that vote together: the tokens of one query block times the heads of one KV head.
struct SubMeanTile {
  std::int32_t kv_head = 0;
  std::int32_t heads = 0;              // G; row r is token r / G, head kv_head * G + r % G
  std::int32_t rows = 0;               // tokens x heads
  std::int32_t past_pages = 0;         // Np
  std::int32_t page_granules = 0;      // P / w
  std::vector<std::int32_t> granules;  // [n]     complete ones in order of position; those of the past come first
  std::vector<std::int32_t> visible;   // [rows]  granules that the row sees: granules[0, visible[r])

  [[nodiscard]] std::int32_t num_pages() const noexcept {  // scored, the last one perhaps in part
    return (static_cast<std::int32_t>(granules.size()) + page_granules - 1) / page_granules;
  }
};

/// The tile of (KV head, query block). `tile` keeps its memory from call to call.
void make_sub_mean_tile(const SelectInput& input, const QueryBlock& block, std::int32_t kv_head, SubMeanTile& tile);

/// Threshold for a share of `value`; scores [Np] = E of the past pages, the mass elsewhere = E of the chunk's.
[[nodiscard]] RowVerdict judge_sub_mean(const SubMeanOptions& options, float value, std::span<const float> energy,
                                        std::int32_t past_pages, std::span<float> scores);

/// Adds the pages that coherence or probe rows ask for to the rows of the mask.
[[nodiscard]] Status rescue_pages(const SelectInput& input, const SubMeanOptions& options, BlockMask& mask,
                                  ThreadPool& pool);

/// Readable reference: loops over rows and granules, fp64 accumulation, fp32 comparison.
///
/// margins  [KV heads, query blocks, 64 * words_per_row] or null: E[j] / threshold - 1 of past pages; NaN where nothing
///          was compared
[[nodiscard]] Status select_sub_mean_reference(const SelectInput& input, const SubMeanOptions& options, BlockMask& mask,
                                               std::vector<double>* margins = nullptr, const Budget& budget = {},
                                               const HeadThresholds& thresholds = {});

/// CPU form: fp32, SIMD by run-time dispatch, threads over (KV head, query block). Same decisions as the reference
/// where |margin| > 1e-4, and the same bits for any number of threads and any chunking that does not cut the tile.
[[nodiscard]] Status select_sub_mean_cpu(const SelectInput& input, const SubMeanOptions& options, BlockMask& mask,
                                         ThreadPool& pool, const Budget& budget = {},
                                         const HeadThresholds& thresholds = {});

}  // namespace compact
