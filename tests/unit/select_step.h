/// A step with made-up queries and page means for tests of selectors and unions.
///
/// Values depend on (stream, position, head, dimension) only: the same tokens in another chunking, another batch or on
/// other physical pages are the same numbers. Spare pages, incomplete pages and spare rows of Q hold NaN.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "compact/block_union.h"
#include "compact/selector.h"

namespace compact::testing {

struct ChunkSpec {
  std::int32_t start = 0;    // S
  std::int32_t tokens = 0;   // C
  std::uint64_t stream = 1;  // which request
};

struct StepSpec {
  std::int32_t q_heads = 4;   // Hq
  std::int32_t kv_heads = 1;  // Hkv
  std::int32_t head_dim = 8;  // D
  std::int32_t page_tokens = 16;
  std::vector<ChunkSpec> chunks;
  std::uint64_t page_seed = 1;  // order of physical pages
  float amplitude = 4.0F;       // of queries: how peaked the scores are
};

/// splitmix64: one well-mixed value per key.
[[nodiscard]] inline std::uint64_t mix(std::uint64_t key) {
  key += 0x9e3779b97f4a7c15ULL;
  key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9ULL;
  key = (key ^ (key >> 27)) * 0x94d049bb133111ebULL;
  return key ^ (key >> 31);
}

/// In [-1/2, 1/2).
[[nodiscard]] inline float value_of(std::uint64_t stream, std::uint64_t kind, std::int64_t index, std::int64_t head,
                                    std::int64_t dim) {
  const std::uint64_t key = mix(mix(mix(stream * 4 + kind) + static_cast<std::uint64_t>(index)) +
                                static_cast<std::uint64_t>(head * 4096 + dim));
  return static_cast<float>(key >> 40) / 16777216.0F - 0.5F;
}

class SelectStep {
 public:
  static constexpr std::int32_t kSparePages = 3;
  static constexpr std::int32_t kSpareRows = 2;  // before each chunk

  explicit SelectStep(const StepSpec& spec) : spec_(spec) {
    std::int32_t tokens = 0;
    for (const ChunkSpec& chunk : spec.chunks) {
      tokens += kSpareRows + chunk.tokens;
      num_pages_ += pages_of(chunk);
    }
    num_pages_ += kSparePages;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    q_.assign(static_cast<std::size_t>(tokens) * heads() * dim(), nan);
    means_.assign(static_cast<std::size_t>(num_pages_ * spec.kv_heads) * dim(), nan);
    counts_.assign(static_cast<std::size_t>(num_pages_), spec.page_tokens);
    std::vector<std::int32_t> physical(static_cast<std::size_t>(num_pages_));
    std::iota(physical.begin(), physical.end(), 0);
    std::shuffle(physical.begin(), physical.end(), std::mt19937_64(spec.page_seed));

    tables_.reserve(spec.chunks.size());
    std::int32_t row = 0;
    auto next_page = physical.begin();
    for (const ChunkSpec& chunk : spec.chunks) {
      row += kSpareRows;
      for (std::int32_t t = 0; t < chunk.tokens; ++t) fill_query(chunk, row + t, chunk.start + t);
      tables_.emplace_back(next_page, next_page + pages_of(chunk));
      next_page += pages_of(chunk);
      for (std::int32_t j = 0; j < pages_of(chunk); ++j)
        fill_page(chunk, j, tables_.back()[static_cast<std::size_t>(j)]);
      chunks_.push_back({row, chunk.tokens, chunk.start, tables_.back().data()});
      row += chunk.tokens;
    }
  }

  SelectStep(const SelectStep&) = delete;
  SelectStep& operator=(const SelectStep&) = delete;

  [[nodiscard]] SelectInput select_input() const {
    SelectInput input;
    input.chunks = chunks_;
    input.q = contiguous_rows<const float>(q_.data(), static_cast<std::int32_t>(q_.size() / (heads() * dim())),
                                           spec_.q_heads, spec_.head_dim);
    input.summaries = {means_.data(), counts_.data(), num_pages_, spec_.kv_heads, spec_.head_dim};
    input.page_tokens = spec_.page_tokens;
    input.softmax_scale = 1.0F;
    return input;
  }

  [[nodiscard]] UnionInput union_input() const {
    UnionInput input;
    input.chunks = chunks_;
    input.num_q_heads = spec_.q_heads;
    input.num_kv_heads = spec_.kv_heads;
    input.page_tokens = spec_.page_tokens;
    input.num_physical_pages = num_pages_;
    input.forced = {0, 0};
    return input;
  }

  [[nodiscard]] float* query(std::int32_t chunk, std::int32_t token, std::int32_t head) {
    const auto row = static_cast<std::size_t>(chunks_[static_cast<std::size_t>(chunk)].q_begin + token);
    return q_.data() + (row * heads() + static_cast<std::size_t>(head)) * dim();
  }
  [[nodiscard]] float* mean(std::int32_t chunk, std::int32_t logical_page, std::int32_t kv_head) {
    return means_.data() + static_cast<std::size_t>(page(chunk, logical_page) * spec_.kv_heads + kv_head) * dim();
  }
  [[nodiscard]] std::int32_t& count(std::int32_t chunk, std::int32_t logical_page) {
    return counts_[static_cast<std::size_t>(page(chunk, logical_page))];
  }
  [[nodiscard]] std::int32_t& table_entry(std::int32_t chunk, std::int32_t logical_page) {
    return tables_[static_cast<std::size_t>(chunk)][static_cast<std::size_t>(logical_page)];
  }
  [[nodiscard]] std::vector<ChunkView>& chunks() { return chunks_; }

 private:
  [[nodiscard]] std::size_t heads() const { return static_cast<std::size_t>(spec_.q_heads); }
  [[nodiscard]] std::size_t dim() const { return static_cast<std::size_t>(spec_.head_dim); }
  [[nodiscard]] std::int32_t page(std::int32_t chunk, std::int32_t logical_page) const {
    return tables_[static_cast<std::size_t>(chunk)][static_cast<std::size_t>(logical_page)];
  }
  [[nodiscard]] std::int32_t pages_of(const ChunkSpec& chunk) const {
    return (chunk.start + chunk.tokens + spec_.page_tokens - 1) / spec_.page_tokens;
  }
  void fill_query(const ChunkSpec& chunk, std::int32_t row, std::int32_t position) {
    for (std::int32_t h = 0; h < spec_.q_heads; ++h) {
      for (std::int32_t x = 0; x < spec_.head_dim; ++x) {
        q_[(static_cast<std::size_t>(row) * heads() + static_cast<std::size_t>(h)) * dim() +
           static_cast<std::size_t>(x)] = spec_.amplitude * value_of(chunk.stream, 0, position, h, x);
      }
    }
  }
  void fill_page(const ChunkSpec& chunk, std::int32_t j, std::int32_t physical) {
    const std::int32_t end = chunk.start + chunk.tokens;
    if ((j + 1) * spec_.page_tokens > end) {
      counts_[static_cast<std::size_t>(physical)] = end - j * spec_.page_tokens;
      return;  // incomplete: the mean stays poisoned
    }
    for (std::int32_t g = 0; g < spec_.kv_heads; ++g) {
      for (std::int32_t x = 0; x < spec_.head_dim; ++x) {
        means_[static_cast<std::size_t>(physical * spec_.kv_heads + g) * dim() + static_cast<std::size_t>(x)] =
            2.0F * value_of(chunk.stream, 1, j, g, x);
      }
    }
  }

  StepSpec spec_;
  std::int32_t num_pages_ = 0;
  std::vector<float> q_;                           // [T, Hq, D]
  std::vector<float> means_;                       // [num_pages, Hkv, D]
  std::vector<std::int32_t> counts_;               // [num_pages]
  std::vector<std::vector<std::int32_t>> tables_;  // [B][Kb]
  std::vector<ChunkView> chunks_;                  // [B]
};

/// Pages of one mask row, ascending.
[[nodiscard]] inline std::vector<std::int32_t> pages_of_row(const BlockMask& mask, std::int32_t head,
                                                            std::int32_t block) {
  std::vector<std::int32_t> pages;
  for (std::int32_t j = 0; j < mask.words_per_row * 64; ++j) {
    if ((mask.row(head, block)[j / 64] >> (j % 64)) & 1U) pages.push_back(j);
  }
  return pages;
}

}  // namespace compact::testing
