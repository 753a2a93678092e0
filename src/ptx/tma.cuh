// TMA tensor loads into shared memory, completing on an mbarrier.
#pragma once

#include <cstdint>

#include "src/ptx/mbarrier.cuh"

namespace compact::ptx {

// map: a CUtensorMap in kernel parameters (const __grid_constant__) or global memory.
__device__ __forceinline__ void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// L2 policy for data that is read once.
__device__ __forceinline__ std::uint64_t make_policy_evict_first() {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Coordinates innermost first, in elements. Elements out of bounds are written as zeros and count as bytes.
__device__ __forceinline__ void tma_load_3d(void* destination, const void* map, std::uint64_t* barrier, int c0, int c1,
                                            int c2, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void tma_load_4d(void* destination, const void* map, std::uint64_t* barrier, int c0, int c1,
                                            int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

}  // namespace compact::ptx
