// Host launch functions of the budgets and of random scores. `stream` is a cudaStream_t; the result is a cudaError_t.
#pragma once

#include <cuda_runtime_api.h>

#include "src/select/cuda/choose_rows.h"

namespace compact {

struct RandomScoreArgs {
  StepTables tables;
  ScoreRows rows;  // mask heads are KV heads
  std::uint64_t seed = 0;
  std::int32_t layer = 0;
  std::int32_t page_tokens = 0;
};
cudaError_t launch_random_scores(const RandomScoreArgs& args, bool pdl, cudaStream_t stream);

// `pdl`: the device has 9.0 or later.
cudaError_t launch_choose_rows(const ChooseArgs& args, std::int32_t num_chunks, bool pdl, cudaStream_t stream);

}  // namespace compact
