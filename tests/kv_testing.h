/// Tools of the KV cache tests: a seeded generator, rows of K or V, and reading the cache back bit by bit.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "compact/paged_kv.h"
#include "src/core/bf16.h"

namespace compact::testing {

/// SplitMix64: the same numbers from the same seed with every compiler and library.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15U);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
  }
  /// Uniform in [low, high].
  std::int32_t integer(std::int32_t low, std::int32_t high) {
    const auto range = static_cast<std::uint64_t>(std::int64_t{high} - low + 1);
    return static_cast<std::int32_t>(low + static_cast<std::int64_t>(bits() % range));
  }
  /// Uniform in [-2, 2) with 24 random bits: sums depend on their order.
  float real() { return static_cast<float>(bits() >> 40) * 0x1p-22F - 2.0F; }

 private:
  std::uint64_t state_;
};

/// K or V of some tokens, [tokens, Hkv, D], in rows that are padded with NaN: a read past a row shows.
class Rows {
 public:
  Rows(std::int32_t tokens, std::int32_t heads, std::int32_t head_dim, std::int32_t padding = 3)
      : tokens_(tokens),
        heads_(heads),
        head_dim_(head_dim),
        head_stride_(head_dim + padding),
        token_stride_(heads * head_stride_ + padding),
        data_(static_cast<std::size_t>(tokens * token_stride_), std::numeric_limits<float>::quiet_NaN()) {}

  static Rows random(std::int32_t tokens, std::int32_t heads, std::int32_t head_dim, Random& random) {
    Rows rows(tokens, heads, head_dim);
    rows.fill([&] { return random.real(); });
    return rows;
  }

  template <class F>
  void fill(F&& value) {
    for (std::int32_t t = 0; t < tokens_; ++t) {
      for (std::int32_t h = 0; h < heads_; ++h) {
        for (std::int32_t d = 0; d < head_dim_; ++d) at(t, h, d) = value();
      }
    }
  }

  float& at(std::int32_t token, std::int32_t head, std::int32_t channel) {
    return data_[static_cast<std::size_t>(token * token_stride_ + head * head_stride_ + channel)];
  }
  const float* row(std::int32_t token, std::int32_t head) const {
    return data_.data() + token * token_stride_ + head * head_stride_;
  }
  ConstRows view(std::int32_t first, std::int32_t tokens) const {
    return {data_.data() + first * token_stride_, tokens, heads_, head_dim_, token_stride_, head_stride_};
  }
  ConstRows view() const { return view(0, tokens_); }
  std::int32_t tokens() const { return tokens_; }

 private:
  std::int32_t tokens_, heads_, head_dim_;
  std::int64_t head_stride_, token_stride_;
  std::vector<float> data_;
};

inline PagedKvCache make_cache(const PagedKvOptions& options) {
  auto cache = PagedKvCache::create(options);
  if (!cache.ok()) throw std::runtime_error(cache.status().message());
  return std::move(cache).value();
}

inline void expect_ok(const Status& status) { EXPECT_TRUE(status.ok()) << status.message(); }

/// The value that a cache of this dtype stores for `value`.
inline float as_stored(float value, DType dtype) { return dtype == DType::kF32 ? value : to_float(to_bf16(value)); }

inline float stored(const PagedKvView& kv, const void* base, std::int64_t offset) {
  if (kv.dtype == DType::kF32) return static_cast<const float*>(base)[offset];
  return to_float(static_cast<const Bf16*>(base)[offset]);
}

inline std::uint32_t bits(float value) { return std::bit_cast<std::uint32_t>(value); }

/// What one request sees of one layer: bits of K and V of its first tokens, and of the records of their pages.
struct LayerContents {
  std::vector<std::uint32_t> k, v;  // [tokens, Hkv, D]
  /// Per page and head, as far as the cache keeps them: mean_k, sub_mean_k of granules with tokens, mean_v, norm_k of
  /// the tokens, coherence, gate pools of blocks with tokens.
  std::vector<std::uint32_t> records;
  std::vector<std::int32_t> count;  // [pages]
  bool operator==(const LayerContents&) const = default;
};

inline void append_bits(std::vector<std::uint32_t>& out, const float* values, std::int32_t count) {
  for (std::int32_t i = 0; i < count; ++i) out.push_back(bits(values[i]));
}

/// The record of one (physical page, KV head) whose first `tokens` tokens are there.
inline void append_record(const PageSummaryView& summaries, std::int32_t page, std::int32_t head, std::int32_t tokens,
                          std::vector<std::uint32_t>& out) {
  const std::int32_t dim = summaries.head_dim;
  const std::int32_t granule = granule_tokens(summaries.page_tokens);
  if (summaries.mean_k != nullptr) append_bits(out, summaries.mean(page, head), dim);
  if (summaries.sub_mean_k != nullptr) {
    append_bits(out, summaries.sub_mean(page, head, 0), (tokens + granule - 1) / granule * dim);
  }
  if (summaries.mean_v != nullptr) append_bits(out, summaries.value_mean(page, head), dim);
  if (summaries.norm_k != nullptr) append_bits(out, summaries.norms(page, head), tokens);
  if (summaries.coherence != nullptr) append_bits(out, summaries.coherence + summaries.record(page, head), 1);
  if (summaries.gate_pool != nullptr) {
    append_bits(out, summaries.gate_block(page, head, 0), (tokens + kGateBlockTokens - 1) / kGateBlockTokens * 3 * dim);
  }
}

inline LayerContents read_layer(const PagedKvCache& cache, RequestId request, std::int32_t layer, std::int32_t tokens) {
  const auto table = cache.page_table(request);
  const PagedKvView kv = cache.layer(layer);
  const PageSummaryView summaries = cache.summaries(layer);
  LayerContents contents;
  for (std::int32_t t = 0; t < tokens; ++t) {
    const std::int32_t page = table.value()[static_cast<std::size_t>(t / kv.page_tokens)];
    for (std::int32_t h = 0; h < kv.num_kv_heads; ++h) {
      const std::int64_t offset = kv.offset(page, t % kv.page_tokens, h);
      for (std::int32_t d = 0; d < kv.head_dim; ++d) {
        contents.k.push_back(bits(stored(kv, kv.k, offset + d)));
        contents.v.push_back(bits(stored(kv, kv.v, offset + d)));
      }
    }
  }
  for (std::int32_t j = 0; j * kv.page_tokens < tokens; ++j) {
    const std::int32_t page = table.value()[static_cast<std::size_t>(j)];
    contents.count.push_back(summaries.count[page]);
    for (std::int32_t h = 0; h < kv.num_kv_heads; ++h) {
      append_record(summaries, page, h, std::min(kv.page_tokens, tokens - j * kv.page_tokens), contents.records);
    }
  }
  return contents;
}

}  // namespace compact::testing
