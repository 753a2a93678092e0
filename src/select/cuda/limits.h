// What the selection kernel is built for. No CUDA types.
#pragma once

#include <cstdint>

namespace compact {

/// Longest mask row: it is made in shared memory. 65,536 pages are a million tokens at P = 16.
inline constexpr std::int32_t kMaxMaskWords = 1024;

}  // namespace compact
