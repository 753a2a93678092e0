// Thread block clusters of sm_90: their size, barrier, and shared memory of the other CTAs. Below, a CTA is alone.
#pragma once

#include <cstdint>

namespace compact::ptx {

__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ __forceinline__ std::uint32_t cluster_size() {
  std::uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

// All threads of all CTAs of the cluster; orders their accesses to shared memory.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The word at this address of the shared memory of CTA `rank`.
__device__ __forceinline__ std::uint64_t load_cluster_shared(std::uint32_t address, std::uint32_t rank) {
  std::uint64_t value = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .b32 remote;\n\tmapa.shared::cluster.u32 remote, %1, %2;\n\tld.shared::cluster.u64 %0, [remote];\n\t}"
      : "=l"(value)
      : "r"(address), "r"(rank)
      : "memory");
#else
  asm volatile("ld.shared.u64 %0, [%1];" : "=l"(value) : "r"(address) : "memory");
#endif
  return value;
}

}  // namespace compact::ptx
