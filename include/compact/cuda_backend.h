/// Which kernels serve a call on an NVIDIA GPU.
#pragma once

#include <cstdint>

namespace compact {

enum class CudaBackend : std::int32_t {
  kAuto = 0,  ///< sm90 on Hopper, sm80 on every other device from sm_80 on
  kSm90 = 1,  ///< wgmma; Hopper only
  kSm80 = 2,  ///< cp.async and mma.sync; sm_80 and later
};

}  // namespace compact
