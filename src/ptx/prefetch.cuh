// Asks for a cache line before it is loaded: latency is hidden without registers.
#pragma once

namespace compact::ptx {

__device__ __forceinline__ void prefetch_l1(const void* global) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(global));
}

}  // namespace compact::ptx
