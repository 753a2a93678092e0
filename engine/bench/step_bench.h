/// Shapes, times and rows of `compact bench step`, for every backend.
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
  double plan = 0;  // seconds; once per step, whatever the layers
  double select = 0;
  double unite = 0;
  double attend = 0;
  double whole = 0;  // select, unite and attend as one; 0: they were timed one by one
  UnionStats stats{};
  DenseReason reason = DenseReason::kNone;
  [[nodiscard]] double total() const { return whole > 0 ? whole : select + unite + attend; }
};

struct StepRow {
  std::string name;   // "dense", a union mode, or kStepDefaultPolicy
  float share = 0;    // of the mean-key selector
  StepTimes times{};  // medians
};

inline constexpr const char* kStepDefaultPolicy = "default policy";

}  // namespace compact::engine
