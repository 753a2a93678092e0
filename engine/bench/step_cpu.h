/// One layer's step on the CPU, select + unite + attend, timed beside dense attention of the same backend.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "compact/attention.h"

namespace compact::engine {

struct StepShape {
  std::int32_t num_q_heads = 8;    // Hq
  std::int32_t num_kv_heads = 2;   // Hkv
  std::int32_t head_dim = 128;     // D
  std::int32_t chunk = 1024;       // C
  std::int32_t page_tokens = 128;  // P
  DType dtype = DType::kF32;       // of K and V
};

struct StepTimes {
  double select = 0;  // seconds
  double unite = 0;
  double attend = 0;
  UnionStats stats{};
  DenseReason reason = DenseReason::kNone;
  [[nodiscard]] double total() const { return select + unite + attend; }
};

struct StepRow {
  std::string name;   // "dense", a union mode, or kStepDefaultPolicy
  float share = 0;    // of the mean-key selector
  StepTimes times{};  // medians
};

inline constexpr const char* kStepDefaultPolicy = "default policy";

/// The last chunk of a request of `context` tokens, made up with structure: rows "dense"; "paper", "tile" and
/// "adaptive" at the share at which adaptive reads `density` of the past pages (found by bisection) with the default
/// sinks and window; and the default policy, crossover included. Every stage is timed as the engine calls it.
/// Errors: kInvalidArgument for a context without a past, or shapes that the cache or the kernels refuse.
[[nodiscard]] Result<std::vector<StepRow>> bench_step_cpu(const StepShape& shape, std::int32_t context, double density,
                                                          std::int32_t repeats, ThreadPool& pool);

}  // namespace compact::engine
