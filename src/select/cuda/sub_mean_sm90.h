// The sub-mean kernel of sm_90a: which steps it takes, and its scratch.
#pragma once

#include "src/select/cuda/scores.h"

namespace compact {

// Scratch in bytes; 0: a step that it does not take (another device, head dimension or page size, or contexts whose
// scratch would be larger than kSubMeanSm90MaxScratch).
constexpr std::int64_t kSubMeanSm90MaxScratch = std::int64_t{256} << 20;
std::int64_t sub_mean_sm90_scratch_bytes(const ScoreArgs& args);
// `args.scratch` holds that much.
cudaError_t launch_sub_mean_sm90(const ScoreArgs& args, const ScoreRows& rows, const SubMeanOptions& options,
                                 cudaStream_t stream);

}  // namespace compact
