/// QUOKA (arXiv 2602.08722), page form: the queries of a block that look least like their mean choose the pages
/// (docs/design/method.md 3.8).
///
/// For each KV head and query block R:
///
///   qm_h     = mean over t in R of q_{t,h}                        for each of the KV head's G query heads
///   pick_h   = the picked_queries tokens of R with the smallest cos(q_{t,h}, qm_h), in that order, ties to the
///   earlier;
///              all of R in order if it has no more
///   qhat[n]  = 1/G * sum over h of q_{pick_h[n],h} / max(||q||, 1e-6)
///   E[j]     = max over n and tokens x of page j of qhat[n] . k_x / max(||k_x||, 1e-6)
///   keep the past pages with the largest E until they hold kept_tokens
///
/// Mask rows are per KV head. Steps follow public re-implementations; pages in place of tokens, and lists in place of a
/// copy, are ours. A row with a NaN or infinity in its queries or keys keeps all its pages and is counted.
#pragma once

#include <cstdint>
#include <vector>

#include "compact/selector.h"

namespace compact {

[[nodiscard]] Status check_quoka_options(const QuokaOptions& options, const Budget& budget,
                                         const HeadThresholds& thresholds);
/// Q, K cache and key norms.
[[nodiscard]] Status check_quoka_input(const SelectInput& input);

/// Queries [picked, D] that choose for a KV head on behalf of the tokens [q_begin, q_begin + tokens), in fp64 and
/// rounded at the end: at most tokens * D products, and the order of close cosines decides who is picked. Returns the
/// number of query rows with NaN or infinity; if there are any, nothing is picked.
[[nodiscard]] std::int32_t pick_queries(const SelectInput& input, std::int32_t q_begin, std::int32_t tokens,
                                        std::int32_t kv_head, std::int32_t picked, std::vector<float>& queries);

/// Best score of every past page for each (KV head, query block).
struct QuokaScores {
  std::int32_t row_pages = 0;           // most past pages of the step
  std::vector<float> scores;            // [Hkv, query blocks, row_pages]
  std::vector<std::int32_t> nonfinite;  // [Hkv, query blocks]  rows; above 0 the scores mean nothing
};

/// Shapes the scores for the step, all 0.
void reset_quoka_scores(const SelectInput& input, const std::vector<QueryBlock>& blocks, QuokaScores& scores);

/// Readable reference, fp64 accumulation.
[[nodiscard]] Status quoka_scores_reference(const SelectInput& input, const QuokaOptions& options,
                                            const std::vector<QueryBlock>& blocks, QuokaScores& scores);

/// CPU form: fp32, SIMD by run-time dispatch, threads over (KV head, some query blocks).
[[nodiscard]] Status quoka_scores_cpu(const SelectInput& input, const QuokaOptions& options,
                                      const std::vector<QueryBlock>& blocks, QuokaScores& scores, ThreadPool& pool);

/// Query blocks of the page form: as long as the paper's runs, within a page.
[[nodiscard]] std::int32_t quoka_block_tokens(std::int32_t page_tokens) noexcept;

}  // namespace compact
