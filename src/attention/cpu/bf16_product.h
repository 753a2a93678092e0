/// The one operation of the bf16 kernel that needs bf16 hardware, and its forms.
#pragma once

#include <cstdint>
#include <span>

#include "src/core/bf16.h"

namespace compact::cpu {

/// C[m][n] (+)= sum over k of A[m][k] * B[k][n], bf16 factors, fp32 sums.
///
/// A  groups of 16 rows, each row contiguous along k:       a_groups[m / 16] + (m % 16) * a_stride + k
/// B  pairs along k side by side, [k / 2][n][2]:             b + (k / 2 * n_rows + n) * 2 + k % 2
/// C  [m][n_rows], n contiguous, 64-byte aligned rows
/// These are the operand layouts of the AMX tile instructions; Q and P^T are packed so, K and V^T are rows of A.
struct ProductArgs {
  const Bf16* const* a_groups = nullptr;  // [m_groups]
  std::int64_t a_stride = 0;              // elements between rows of a group
  const Bf16* b = nullptr;
  float* c = nullptr;
  std::int32_t m_groups = 0;  // m = 16 * m_groups
  std::int32_t k_steps = 0;   // k = 32 * k_steps
  std::int32_t n_groups = 0;  // n = n_rows = 16 * n_groups
  bool accumulate = false;    // C += instead of C =
};

struct Bf16Product {
  const char* name = "";
  /// Around the products of an item, on its thread: tile configuration.
  void (*begin)() = nullptr;
  void (*end)() = nullptr;
  void (*multiply)(const ProductArgs& args) = nullptr;
};

/// Scalar code with the meaning of the others: what tests compare with and run on any machine.
[[nodiscard]] const Bf16Product& emulated_product() noexcept;

/// vdpbf16ps of AVX512_BF16 (Cooper Lake, Zen 4, Sapphire Rapids and later); null if this machine has none.
[[nodiscard]] const Bf16Product* dot_product() noexcept;

/// AMX-BF16 tiles (Sapphire Rapids and later); null if this machine has none or the kernel does not lend them.
[[nodiscard]] const Bf16Product* amx_product() noexcept;

}  // namespace compact::cpu
