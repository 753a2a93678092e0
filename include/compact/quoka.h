/// QUOKA (arXiv 2602.08722) as published: tokens in place of pages, read from a gathered copy. A baseline: the selector
/// `quoka` (selector.h) is the same score over pages, without the copy.
///
/// For each KV head and run R of query tokens, candidates are all tokens x before the run (docs/design/method.md 3.8):
///
///   qm_h      = mean over t in R of q_{t,h}                          for each of the KV head's G query heads
///   pick_h    = the N_Q tokens of R with the smallest cos(q_{t,h}, qm_h), in that order; all of R if it has no more
///   qhat[n]   = 1/G * sum over h of q_{pick_h[n],h} / max(||q||, 1e-6)
///   score[x]  = max over n of qhat[n] . k_x / max(||k_x||, 1e-6)
///   R attends to the tokens with the largest scores (ties: the earlier) and to itself
///
/// Steps follow public re-implementations of the paper.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "compact/attention.h"
#include "compact/selector.h"
#include "compact/status.h"
#include "compact/thread_pool.h"

namespace compact {

struct QuokaTokenOptions {
  std::int32_t run_tokens = 128;     // R: this many queries, at absolute multiples; 0: the whole chunk
  std::int32_t picked_queries = 16;  // N_Q; not used with picked_share
  std::int32_t kept_tokens = 1024;   // of all before the run; not used with kept_share
  float picked_share = 0;            // above 0: N_Q = max(1, floor(share * |R|))
  float kept_share = 0;              // above 0: max(1, floor(share * tokens before the run)) are kept
};

/// "quoka" (the paper's parameters) and "quoka-25" (a quarter of the chunk's queries pick a quarter of its past).
/// Errors: kInvalidArgument for an unknown name.
[[nodiscard]] Result<QuokaTokenOptions> quoka_token_preset(std::string_view name);

/// What one run of one chunk reads.
struct QuokaRun {
  std::int32_t chunk = 0;
  std::int32_t q_begin = 0;         // first row in Q
  std::int32_t q_len = 0;           // |R|
  std::int32_t first_position = 0;  // r0
  std::int32_t kept_tokens = 0;     // for each KV head
  std::int64_t tokens_begin = 0;    // first entry in QuokaTokens::tokens
};

struct QuokaTokens {
  std::vector<QuokaRun> runs;
  std::vector<std::int32_t> tokens;  // [runs][Hkv, kept_tokens]  absolute positions below r0, ascending
  std::int64_t nonfinite_rows = 0;   // query rows with NaN or infinity, or that meet such keys; their runs keep all

  [[nodiscard]] std::span<const std::int32_t> of(const QuokaRun& run, std::int32_t kv_head) const noexcept {
    const auto begin = static_cast<std::size_t>(run.tokens_begin + std::int64_t{kv_head} * run.kept_tokens);
    return std::span(tokens).subspan(begin, static_cast<std::size_t>(run.kept_tokens));
  }
};

/// Chooses the tokens. Reads summaries.norm_k and the K cache. The same tokens for any number of threads.
/// Errors: kInvalidArgument (shapes, options, a missing or stale summary), kOutOfMemory.
[[nodiscard]] Status select_quoka_tokens(const SelectInput& input, const QuokaTokenOptions& options,
                                         QuokaTokens& selection, ThreadPool& pool);

/// Attention of every run over its tokens and itself, causal inside the run: copies K and V of one run at a time,
/// 2 * (kept + |R|) * Hkv * D elements, and reads them with attend_cpu. o and lse as in AttentionOutput.
/// Errors: kInvalidArgument (a selection that does not fit the step; those of attend_cpu), kOutOfMemory.
[[nodiscard]] Status attend_quoka(const SelectInput& input, const QuokaTokens& selection, const AttentionOutput& output,
                                  ThreadPool& pool);

}  // namespace compact
