// Host numbers of a step on the device: its shape, bounds, and where everything lies in the workspace. No CUDA types:
// the plan and the union are tested on the CPU.
#pragma once

#include "compact/step_cuda.h"
#include "src/unite/cuda/plan_step.h"
#include "src/unite/cuda/unite_tree.h"

namespace compact {

struct StepLayout {
  StepShape shape;
  CudaStepSizes sizes;
  // CTAs of each call; 0: nothing is launched. A step without query rows has no tiles, but sums of every chunk.
  std::int32_t plan_ctas = 0;
  std::int32_t select_tiles = 0;
  std::int32_t unite_trees = 0;
  std::int64_t header = 0;      // byte offsets
  std::int64_t chunks = 0;      // StepChunk [B]
  std::int64_t blocks = 0;      // QueryBlock [max_blocks]
  std::int64_t pairs = 0;       // BlockPair [max_pairs]
  std::int64_t nodes = 0;       // UniteNode [max_nodes]
  std::int64_t node_words = 0;  // [max_nodes, words_per_row]

  [[nodiscard]] StepTables tables(void* workspace) const;
};

/// Checks the host's numbers; looks at no pointer.
[[nodiscard]] Result<StepLayout> lay_out_step(const CudaStepInput& input);

/// What the kernels are told.
[[nodiscard]] PlanArgs plan_args(const StepLayout& layout, const CudaStepInput& input, std::int32_t* error,
                                 void* workspace);
[[nodiscard]] UniteArgs unite_args(const StepLayout& layout, const CudaStepInput& input, const std::uint64_t* mask,
                                   const CudaPageLists& lists, void* workspace);

}  // namespace compact
