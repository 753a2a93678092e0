/// Exact attention mass per page: what every selector estimates, and the yardstick of recall.
///
///   lse[t,h]  = log sum over keys x <= p(t) of exp(s q_{t,h} . k_x)
///   m[h,i,j]  = mean over the queries t of block i of: sum over keys x in page j, x <= p(t), of exp(s q . k_x - lse)
///
/// Source: docs/design/method.md 3.4 and 8.2. Reads every key once for each query head: half the FLOP of dense
/// attention.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "compact/selector.h"
#include "compact/status.h"
#include "compact/tensor_view.h"
#include "compact/thread_pool.h"

namespace compact {

/// How the queries of a block are joined. Only the mean makes the mass of all pages sum to 1.
enum class MassAggregate : std::int32_t { kMean = 0, kMax = 1 };

struct PageMassInput {
  std::span<const ChunkView> chunks;  // [B]  their own tokens appended
  ConstRows q;                        // [T, Hq, D]  post-RoPE
  PagedKvView kv;                     // of this layer; V is not read
  float softmax_scale = 0;            // s
  std::int32_t block_tokens = 128;    // a power of two
  MassAggregate aggregate = MassAggregate::kMean;
};

/// Masses of one layer and step.
struct PageMass {
  std::int32_t num_heads = 0;      // Hq
  std::int32_t pages_per_row = 0;  // max over chunks of Np
  std::vector<QueryBlock> blocks;  // [num_blocks]
  std::vector<float> past;         // [Hq, num_blocks, pages_per_row]  past pages; 0 from Np on
  std::vector<float> chunk;        // [Hq, num_blocks]  all pages of the chunk, boundary page included
  /// [Hq, num_blocks]  queries with a NaN or +inf score, or with -inf only; the masses of such a block are NaN.
  std::vector<std::int32_t> nonfinite;

  [[nodiscard]] std::int64_t row_index(std::int32_t head, std::int32_t block) const noexcept {
    return std::int64_t{head} * static_cast<std::int64_t>(blocks.size()) + block;
  }
  /// [pages_per_row]  m[head, block, j] of past pages j.
  [[nodiscard]] const float* past_row(std::int32_t head, std::int32_t block) const noexcept {
    return past.data() + row_index(head, block) * pages_per_row;
  }
  [[nodiscard]] float chunk_mass(std::int32_t head, std::int32_t block) const noexcept {
    return chunk[static_cast<std::size_t>(row_index(head, block))];
  }
};

/// Fills `mass`. fp32, SIMD by run-time dispatch; the same bits for any number of threads.
/// Errors: kInvalidArgument for inconsistent shapes or a page table entry outside the cache; kOutOfMemory.
[[nodiscard]] Status compute_page_mass(const PageMassInput& input, PageMass& mass, ThreadPool& pool);

}  // namespace compact
