// Host launch functions of the plan and the union. `stream` is a cudaStream_t; the result is a cudaError_t.
#pragma once

#include <cuda_runtime_api.h>

#include "src/unite/cuda/plan_step.h"
#include "src/unite/cuda/unite_tree.h"

namespace compact {

cudaError_t launch_plan_step(const PlanArgs& args, std::int32_t ctas, bool pdl, cudaStream_t stream);
cudaError_t launch_unite(const UniteArgs& args, std::int32_t trees, bool pdl, cudaStream_t stream);

}  // namespace compact
