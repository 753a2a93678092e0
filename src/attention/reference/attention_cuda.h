// Slow CUDA reference over list semantics, for tests on shapes that the CPU reference is too slow for.
#pragma once

#include "compact/attention_cuda.h"

namespace compact {

// fp32 throughout, one warp per row, two passes over the list. o: fp32 [T, Hq, D] contiguous; lse: [T, Hq] or null.
// round_weights: the weights exp(s - max) are rounded to the 16-bit type before they meet V, as a tensor core kernel
// does: the error of such a kernel against the exact result is judged by the error of this one.
Status attend_cuda_reference(const CudaAttentionInput& input, float* o, float* lse, bool round_weights, void* stream);

}  // namespace compact
