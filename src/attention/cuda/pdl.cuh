// Programmatic dependent launch. Rule for every kernel of the chain prepare -> main -> combine, and for the kernels
// before and after it: wait before the first read of produced data and before the first global write. Then a successor
// that started early can never overwrite a list or a workspace still in use.
#pragma once

namespace compact {

// Below sm_90 there is no early start and nothing to wait for; the host launches with the attribute from sm_90 on only.
__device__ inline void pdl_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace compact
