/// The picture of `compact bench step`: what a step takes against what it reads, and against the context.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/bench/step_bench.h"

namespace compact::engine {

/// A context and wanted density that were timed; the first row is dense.
struct StepPoint {
  std::int32_t context_tokens = 0;
  double wanted_density = 0;
  std::vector<StepRow> rows;
};

/// Milliseconds against density at the longest context, if several densities were timed; times dense against the
/// context at the first density, if several contexts were. Neither: an empty sheet with the title.
[[nodiscard]] std::string step_svg(const std::string& title, const std::vector<StepPoint>& points);

}  // namespace compact::engine
