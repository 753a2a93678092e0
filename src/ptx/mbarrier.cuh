// mbarrier: phases of shared memory between TMA, producer and consumers. One-liners over PTX.
#pragma once

#include <cstdint>
#ifdef COMPACT_PTX_SPIN_LIMIT
#include <cstdio>
#endif

#include "src/ptx/shared_address.cuh"

namespace compact::ptx {

__device__ __forceinline__ void mbarrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to TMA.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(std::uint64_t* barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(std::uint64_t* barrier, std::uint32_t parity) {
  std::uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
      "selp.u32 %0, 1, 0, complete;\n"
      "}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

#ifdef COMPACT_PTX_SPIN_LIMIT
static __device__ volatile int spin_limit_reached;  // once a wait is given up, no other begins: the kernel ends soon
#endif

// Waits until the phase of this parity is complete. A fresh barrier has "completed" parity 1.
// COMPACT_PTX_SPIN_LIMIT (clock cycles) is for finding out why a kernel hangs: a wait that takes longer says who waits
// for which barrier, and goes on with wrong data. After the first, only waits that are half way there report too.
__device__ __forceinline__ void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
#ifdef COMPACT_PTX_SPIN_LIMIT
  const long long begin = clock64();
  while (!mbarrier_try_wait(barrier, parity)) {
    if (spin_limit_reached != 0 && clock64() - begin < (COMPACT_PTX_SPIN_LIMIT) / 2) return;
    if (clock64() - begin < COMPACT_PTX_SPIN_LIMIT) continue;
    spin_limit_reached = 1;
    if (threadIdx.x % 32 == 0) {
      printf("wait given up: block %d warp %d barrier at %u parity %u\n", static_cast<int>(blockIdx.x),
             static_cast<int>(threadIdx.x) / 32, shared_address(barrier), parity);
    }
    return;
  }
#else
  while (!mbarrier_try_wait(barrier, parity)) {
  }
#endif
}

}  // namespace compact::ptx
