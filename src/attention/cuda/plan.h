// Host plan of one call: the checked request, the kernel that serves it, and where its workspace lies. Also what tests
// and benchmarks use to launch the kernels of the chain one at a time.
#pragma once

#include "compact/attention_cuda.h"
#include "src/attention/cuda/launch.h"
#include "src/attention/cuda/prefill_params.h"
#include "src/attention/cuda/workspace.h"

namespace compact {

struct CudaPlan {
  CudaBackend backend = CudaBackend::kSm80;  // never kAuto
  Schedule schedule;
  std::int32_t max_m_tiles = 0;
  std::int32_t max_slots = 0;
  std::int32_t num_sms = 0;
  bool pdl = false;  // the device knows programmatic dependent launch
  Workspace workspace;
};

// Checks sizes and options and chooses the kernel; no pointer is looked at.
[[nodiscard]] Result<CudaPlan> plan_attention(const CudaAttentionInput& input, const CudaAttentionOptions& options);

// The part of the plan that follows from the kernel's tile: schedule, bounds, workspace.
[[nodiscard]] Status plan_tile(CudaPlan& plan, const CudaAttentionInput& input, const CudaAttentionOptions& options,
                               std::int32_t tile_rows, std::int32_t tile_tokens, std::int32_t num_workers);

struct CudaChain {
  PrepareArgs prepare;
  PrefillParams main;
  CombineArgs combine;
};
[[nodiscard]] CudaChain make_chain(const CudaPlan& plan, const CudaAttentionInput& input,
                                   const CudaAttentionOutput& output, const CudaAttentionOptions& options,
                                   void* workspace);

[[nodiscard]] Status launch_chain_prepare(const CudaPlan& plan, const CudaChain& chain, cudaStream_t stream);
[[nodiscard]] Status launch_chain_main(const CudaPlan& plan, const CudaChain& chain, cudaStream_t stream);
[[nodiscard]] Status launch_chain_combine(const CudaPlan& plan, const CudaChain& chain, cudaStream_t stream);

}  // namespace compact
