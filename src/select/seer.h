/// SeerAttention's gate (arXiv 2410.13276; docs/design/method.md 3.6), shared by its reference and its CPU form.
///
/// Blocks of 64 tokens, absolute, on both sides. Inputs are queries and keys before RoPE:
///
///   qbar[i,h] = mean over the tokens of block i that are in the chunk of q_pre[t,h]
///   khat[j,g] = concat( max, min, mean over the tokens of block j of k_pre[t,g] )          summary gate_pool
///   ktil[j,h] = Rope(64 j) . ( khat[j,g(h)]^T Wk_h )
///   qtil[i,h] = Rope(64 i) . qbar[i,h]            or of its map Wq_h; several heads of a KV head stand side by side
///   p[i,j,h]  = softmax over j <= i of qtil[i,h] . ktil[j,h] / sqrt(D)
///   E[i,J,h]  = max over the blocks j of page J of p[i,j,h];   keep J iff E > threshold
///
/// All blocks up to the query's own compete, those of the chunk included, so a block that no edge cuts keeps the same
/// pages in every chunking. Keys are mapped at every step: 6 D / (256 C) of dense attention, 0.3 % at D 128 and C 1024.
/// A row with a NaN or +inf score keeps all its pages and is counted.
#pragma once

#include <cstdint>
#include <vector>

#include "compact/selector.h"
#include "src/select/select_rows.h"

namespace compact {

[[nodiscard]] Status check_seer_options(const SeerOptions& options);
[[nodiscard]] Status check_seer_input(const SelectInput& input, const SeerOptions& options);

/// A mask with a row for each block of 64 query tokens and mask head. Returns the query heads that share a row.
[[nodiscard]] std::int32_t reset_seer_mask(const SelectInput& input, const GateWeights& gates, BlockMask& mask);

/// cos and sin of the positions 64 j: [blocks, D/2] each, angles rounded to fp32 as the model's own.
struct GateRope {
  std::vector<float> cosines;
  std::vector<float> sines;

  /// Rotates one row [D] as block j's; pairs are (d, d + D/2).
  template <class T>
  void rotate(std::int32_t block, std::int32_t head_dim, T* row) const {
    const std::int32_t half = head_dim / 2;
    for (std::int32_t d = 0; d < half; ++d) {
      const auto at = static_cast<std::size_t>(block * half + d);
      const T low = row[d];
      const T high = row[d + half];
      row[d] = low * T{cosines[at]} - high * T{sines[at]};
      row[d + half] = high * T{cosines[at]} + low * T{sines[at]};
    }
  }
};
[[nodiscard]] GateRope make_gate_rope(const GateWeights& gates, std::int32_t num_blocks);

/// Threshold and page scores [Kb] of a row whose blocks up to its own have these probabilities.
[[nodiscard]] RowVerdict judge_seer(float value, std::span<const float> probabilities, std::int32_t page_blocks,
                                    std::int32_t past_pages, std::span<float> scores);

/// Readable reference: one row after the other, fp64 accumulation, fp32 comparison. margins: [mask_heads, query blocks,
/// 64 * words_per_row] or null: E / threshold - 1 of past pages; NaN where nothing was compared.
[[nodiscard]] Status select_seer_reference(const SelectInput& input, const SeerOptions& options, BlockMask& mask,
                                           std::vector<double>* margins = nullptr, const Budget& budget = {},
                                           const HeadThresholds& thresholds = {});

/// CPU form: fp32, SIMD by run-time dispatch, threads over heads. The same bits for any number of threads and any
/// chunking that does not cut the block.
[[nodiscard]] Status select_seer_cpu(const SelectInput& input, const SeerOptions& options, BlockMask& mask,
                                     ThreadPool& pool, const Budget& budget = {},
                                     const HeadThresholds& thresholds = {});

}  // namespace compact
