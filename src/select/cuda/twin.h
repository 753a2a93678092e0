// What the device knows of selectors: their rules as budgets. No CUDA types.
#pragma once

#include "compact/select_cuda.h"
#include "src/core/refusal.h"
#include "src/select/cuda/choose_rows.h"

namespace compact {

// Who chooses for a step.
enum class Twin : std::int32_t {
  kDense,
  kStatic,
  kMeanKey,        // judged by the kernels that score
  kMeanKeyScores,  // other votes, visibilities, tiles, and budgets
  kOracle,
  kSubMean,
  kXAttention,
  kQuoka,
  kSeer,
  kRandom,
  kExternal
};

// The rule that select_mean_key_cuda knows. Errors: kUnsupported.
[[nodiscard]] Status check_mean_key_twin(const Refusal& refuse, const MeanKeyOptions& rule);

// Errors: as cuda_mask_shape.
[[nodiscard]] Result<Twin> find_twin(const SelectorOptions& options);

// The rule for rows of scores (kOracle to kRandom), and of kDense, which keeps all without looking at them.
[[nodiscard]] ChooseRule choose_rule(Twin twin, const SelectorOptions& options, std::int32_t page_tokens);

}  // namespace compact
