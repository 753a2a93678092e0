// Shared-memory matrix descriptors of wgmma for tiles of [panel][rows][64 elements] with the 128-byte swizzle.
//
// A panel row is 128 bytes; the 16-byte piece j of row r lies at r * 128 + ((j ^ (r & 7)) * 16). The swizzle works on
// address bits, hence panels start on multiples of 1024 bytes.
#pragma once

#include <cstdint>

#include "src/core/host_device.h"

namespace compact::ptx {

inline constexpr int kSwizzleRowBytes = 128;
inline constexpr int kSwizzleAtomBytes = 1024;  // 8 rows

// Byte offset of column byte `column_bytes` (0..127) of row `row` inside a panel.
CA_HOST_DEVICE constexpr std::uint32_t swizzle_128b(std::uint32_t row, std::uint32_t column_bytes) {
  return row * kSwizzleRowBytes + (column_bytes ^ ((row & 7) << 4));
}

// Bits 0-13 address / 16, 16-29 leading offset / 16, 32-45 stride offset / 16, 62-63 = 1: 128-byte swizzle. Kept as two
// words: shared addresses have 18 bits, so moving the address is an addition to the low word without a carry.
struct SmemDescriptor {
  std::uint32_t low, high;

  CA_HOST_DEVICE constexpr SmemDescriptor advanced(int bytes) const { return {low + (bytes >> 4), high}; }
  CA_HOST_DEVICE constexpr std::uint64_t bits() const { return std::uint64_t{high} << 32 | low; }
#ifdef __CUDACC__
  // wgmma takes descriptors in uniform registers; a broadcast tells the compiler that all lanes agree.
  __device__ __forceinline__ SmemDescriptor uniform() const { return {__shfl_sync(0xffffffffu, low, 0), high}; }
#endif
};

CA_HOST_DEVICE constexpr SmemDescriptor make_descriptor_128b(std::uint32_t address, std::uint32_t leading_bytes) {
  return {(address >> 4 & 0x3fff) | leading_bytes >> 4 << 16, (kSwizzleAtomBytes >> 4) | 1u << 30};
}

// Operand with the reduction index along the panel row (Q and K of Q K^T). Step of 16 indices: 32 bytes within a
// panel, then the next panel. The leading offset is not used in this mode.
CA_HOST_DEVICE constexpr SmemDescriptor k_major_descriptor(std::uint32_t address) {
  return make_descriptor_128b(address, 16);
}

// B operand with the reduction index along the rows (V of P V), N = 64 elements per panel. Step of 16: 16 rows.
CA_HOST_DEVICE constexpr SmemDescriptor n_major_descriptor(std::uint32_t address, std::uint32_t panel_bytes) {
  return make_descriptor_128b(address, panel_bytes);
}

}  // namespace compact::ptx
