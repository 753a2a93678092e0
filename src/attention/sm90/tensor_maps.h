// TMA tensor maps, encoded by the driver without linking against it.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <span>

#include "compact/status.h"
#include "compact/tensor_view.h"

namespace compact {

/// A map of 16-bit elements with the 128-byte swizzle; reads out of bounds give zeros. Innermost dimension first.
///
/// name     for messages, e.g. "K"
/// sizes    [rank]      elements, each >= 1
/// strides  [rank - 1]  elements between neighbours in dimension 1, 2, ...; multiples of 8, in any order of size; that
///                      of a dimension of size 1 may be anything
/// box      [rank]      elements; box[0] * 2 bytes is the swizzled row, 128 bytes
/// Errors: kInvalidArgument (alignment, driver refuses the map), kUnsupported (driver has no tensor maps).
[[nodiscard]] Status encode_tensor_map(CUtensorMap& map, const char* name, DType dtype, const void* base,
                                       std::span<const std::uint64_t> sizes, std::span<const std::int64_t> strides,
                                       std::span<const std::uint32_t> box);

}  // namespace compact
