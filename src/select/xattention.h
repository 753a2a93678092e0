/// XAttention's rule (arXiv 2503.16428; docs/design/method.md 3.7), shared by its reference and its CPU form.
///
/// Strided row i holds the query tokens with floor(p / st) = i, strided column j the keys [st j, st (j + 1)), absolute.
///
///   z[i,j]  = s / n[i,j] * sum over u in 0..st-1 of q_{st i + st-1-u} . k_{st j + u}      over the n[i,j] pairs of
///   which
///                                                                                       both tokens exist
///   A[I,J]  = sum over rows i of query block I and columns j of page J of softmax over j <= i of z[i,.]
///   keep pages in order of A, forced ones and the diagonal first, until their sum reaches mass * sum of A
///
/// Mask rows are per query head. Pages of the chunk compete, as published, so that a query block that no edge cuts
/// keeps the same pages in every chunking. A column of which a row has no pair is not seen by it. A row with a NaN or
/// +inf score keeps all its pages and is counted.
#pragma once

#include <cstdint>
#include <vector>

#include "compact/selector.h"

namespace compact {

[[nodiscard]] Status check_xattention_options(const XAttentionOptions& options);

/// Strided rows and columns of a query block of a chunk: what exists of them.
struct StridedRows {
  std::int32_t stride = 0;       // st
  std::int32_t chunk_start = 0;  // S: queries before it do not exist
  std::int32_t context = 0;      // L: queries and keys from it on do not exist

  /// Offsets [begin, end) of the query tokens of row i that exist.
  [[nodiscard]] std::int32_t first_query(std::int32_t i) const noexcept;
  [[nodiscard]] std::int32_t end_query(std::int32_t i) const noexcept;
  /// Pairs of row i with a column of `keys` existing keys.
  [[nodiscard]] std::int32_t pairs(std::int32_t i, std::int32_t keys) const noexcept;
  /// Columns that row i sees: its own is left out if it has no pair in it.
  [[nodiscard]] std::int32_t visible_columns(std::int32_t i) const noexcept;
};

/// A of every page up to the diagonal.
struct XAttentionSums {
  std::int32_t row_pages = 0;           // pages of the longest context of the step
  std::vector<float> sums;              // [Hq, query blocks, row_pages]  0 past the diagonal
  std::vector<std::int32_t> nonfinite;  // [Hq, query blocks]  strided rows; above 0 the sums of the block mean nothing
};

/// Readable reference: loops over rows, columns and pairs, fp64 accumulation. blocks: of min(128, P) tokens.
[[nodiscard]] Status xattention_sums_reference(const SelectInput& input, const XAttentionOptions& options,
                                               const std::vector<QueryBlock>& blocks, XAttentionSums& sums);

/// CPU form: fp32, SIMD by run-time dispatch, threads over (KV head, some query blocks). The same bits for any number
/// of threads and any chunking that does not cut the block.
[[nodiscard]] Status xattention_sums_cpu(const SelectInput& input, const XAttentionOptions& options,
                                         const std::vector<QueryBlock>& blocks, XAttentionSums& sums, ThreadPool& pool);

}  // namespace compact
