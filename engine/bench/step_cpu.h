/// One layer's step on the CPU, select + unite + attend, timed beside dense attention of the same backend.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/bench/step_bench.h"

namespace compact::engine {

/// The last chunk of a request of `context` tokens, made up with structure: rows "dense"; "paper", "tile" and
/// "adaptive" at the share at which adaptive reads `density` of the past pages (found by bisection) with the default
/// sinks and window; and the default policy, crossover included. Every stage is timed as the engine calls it.
/// Errors: kInvalidArgument for a context without a past, or shapes that the cache or the kernels refuse.
[[nodiscard]] Result<std::vector<StepRow>> bench_step_cpu(const StepShape& shape, std::int32_t context, double density,
                                                          std::int32_t repeats, ThreadPool& pool);

}  // namespace compact::engine
