/// Makes Highway's dispatch run one instruction set after the other.
#pragma once

#include <cstdint>
#include <vector>

#include "hwy/targets.h"

namespace compact::testing {

[[nodiscard]] inline std::vector<std::int64_t> machine_targets() {
  std::vector<std::int64_t> targets;
  for (std::int64_t rest = hwy::SupportedTargets(); rest != 0; rest &= rest - 1) targets.push_back(rest & -rest);
  return targets;
}

/// Dispatch chooses this instruction set while the object lives.
class OneTarget {
 public:
  explicit OneTarget(std::int64_t target) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
  ~OneTarget() {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
  OneTarget(const OneTarget&) = delete;
  OneTarget& operator=(const OneTarget&) = delete;
};

}  // namespace compact::testing
