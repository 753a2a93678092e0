// Asynchronous 16-byte copies from global to shared memory (sm_80 and later).
#pragma once

#include <cstdint>

#include "src/ptx/shared_address.cuh"

namespace compact::ptx {

// Copies 16 bytes past L1; writes zeros and reads nothing if !valid.
__device__ __forceinline__ void cp_async_16(std::uint32_t to_shared, const void* from_global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from_global),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Arrives at an mbarrier once this thread's copies so far have landed; one of the arrivals it was initialised with.
// Copies count as plain writes: wgmma needs a proxy fence behind the wait.
__device__ __forceinline__ void cp_async_arrive(std::uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Waits until at most N of this thread's latest groups are in flight.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace compact::ptx
