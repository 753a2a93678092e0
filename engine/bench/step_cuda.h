/// One layer's step on an NVIDIA GPU, select + unite + attend, timed beside dense attention by the same kernels.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/bench/step_bench.h"

namespace compact::engine {

/// Name of the device and of the kernels that run on it. Errors: kUnsupported (build without CUDA, device too old),
/// kCudaError.
struct CudaBenchDevice {
  std::string name;
  std::string kernel;  // "sm90" or "sm80"
};
[[nodiscard]] Result<CudaBenchDevice> cuda_bench_device();

/// The last chunks of `requests` requests of `context` tokens each, bf16. Keys are normal around one topic per page;
/// every query row asks for three pages of a pool that its (request, KV head) shares, so that the density after the
/// union of mode paper comes out near `density`. Rows "dense"; "paper", "tile" and "adaptive"; and the default policy,
/// crossover included; each with the default share, sinks and window.
///
/// Three input sets in turn, at least 20 runs, each between two CUDA events and queued while the stream is held: launch
/// overhead hides no stage. `whole` is run_step_cuda as a replayed CUDA graph. with_attention false: selection and
/// union alone, no row "dense", no `whole`. Errors: kInvalidArgument for a context without a past or that is not whole
/// pages, and what the kernels refuse.
[[nodiscard]] Result<std::vector<StepRow>> bench_step_cuda(const StepShape& shape, std::int32_t requests,
                                                           std::int32_t context, double density, bool with_attention);

}  // namespace compact::engine
