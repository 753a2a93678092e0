// From the 16-bit types of the tensor cores to fp32.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "src/ptx/convert.cuh"

namespace compact::ptx {

// The two 16-bit values of a register, exactly; x is the element at the lower address.
template <MmaType kType>
__device__ __forceinline__ float2 unpack_pair(std::uint32_t pair) {
  if constexpr (kType == MmaType::kBf16) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
}

}  // namespace compact::ptx
