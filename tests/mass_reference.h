/// Attention mass per page as plainly as possible, fp64: docs/design/method.md 8.1, oracle O4.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "compact/oracle.h"
#include "tests/kv_testing.h"

namespace compact::testing {

/// Masses of one (query head, query block), every page of the context: [Kb].
[[nodiscard]] inline std::vector<double> reference_mass(const PageMassInput& input, std::int32_t head,
                                                        const QueryBlock& block) {
  const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
  const PagedKvView& kv = input.kv;
  const std::int32_t kv_head = head / (input.q.heads / kv.num_kv_heads);
  std::vector<double> mass(static_cast<std::size_t>(chunk.num_pages(kv.page_tokens)));
  for (std::int32_t t = 0; t < block.tokens; ++t) {
    const float* q = input.q.row(block.q_begin + t, head);
    std::vector<double> scores;
    for (std::int32_t x = 0; x <= block.first_position + t; ++x) {
      const std::int64_t offset = kv.offset(chunk.page_table[x / kv.page_tokens], x % kv.page_tokens, kv_head);
      double dot = 0;
      for (std::int32_t d = 0; d < kv.head_dim; ++d) dot += double{q[d]} * double{stored(kv, kv.k, offset + d)};
      scores.push_back(double{input.softmax_scale} * dot);
    }
    const double largest = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (const double score : scores) sum += std::exp(score - largest);
    std::vector<double> row(mass.size());
    for (std::size_t x = 0; x < scores.size(); ++x) {
      row[x / static_cast<std::size_t>(kv.page_tokens)] += std::exp(scores[x] - largest) / sum;
    }
    for (std::size_t j = 0; j < mass.size(); ++j) {
      mass[j] = input.aggregate == MassAggregate::kMean ? mass[j] + row[j] / block.tokens : std::max(mass[j], row[j]);
    }
  }
  return mass;
}

}  // namespace compact::testing
