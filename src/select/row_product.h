/// Small matrix products of the gate: rows in any place times a matrix in one piece. SIMD by run-time dispatch
/// (Highway).
#pragma once

#include <cstdint>
#include <span>

namespace compact {

/// out[i, c] = sum over x ascending of rows[i][x] * matrix[x, c]. One chain of multiply-adds per element, so a row's
/// result does not depend on the rows beside it.
///
/// rows    [n][depth]
/// matrix  [depth, width]
/// out     [n, width]
void multiply_rows(std::span<const float* const> rows, std::int32_t depth, const float* matrix, std::int32_t width,
                   float* out);

}  // namespace compact
