/// A step over a real paged cache for tests of selectors that read keys or summaries.
///
/// Values depend on (stream, position, head, dimension) only: the same tokens in another chunking, another batch or on
/// other physical pages are the same numbers. Keys of a stretch of 48 tokens share a topic, and every query wants one
/// topic of its past, so that pages differ. Spare pages, the rest of the last page and spare rows of Q hold NaN.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "compact/oracle.h"
#include "compact/paged_kv.h"
#include "compact/selector.h"
#include "tests/kv_testing.h"
#include "tests/unit/select_step.h"

namespace compact::testing {

struct KvStepSpec {
  std::int32_t q_heads = 4;   // Hq
  std::int32_t kv_heads = 1;  // Hkv
  std::int32_t head_dim = 8;  // D
  std::int32_t page_tokens = 16;
  std::vector<ChunkSpec> chunks;
  std::uint64_t page_seed = 1;  // order of physical pages
  float amplitude = 3.0F;       // of queries: how peaked the attention is
  DType dtype = DType::kF32;
  KvLayout layout = KvLayout::kHnd;
  SummaryFields summaries{.mean_k = true};
  std::int32_t append_tokens = 0;  // past tokens of one append; 0: all at once
  std::int32_t first_kv_head = 0;  // of a larger model, whose other heads lie elsewhere
  std::int32_t changed_from = std::numeric_limits<std::int32_t>::max();  // K and V are others from this position on

  [[nodiscard]] std::string describe() const {
    std::string text = "Hq " + std::to_string(q_heads) + " Hkv " + std::to_string(kv_heads) + " D " +
                       std::to_string(head_dim) + " P " + std::to_string(page_tokens) + " " + dtype_name(dtype) +
                       (layout == KvLayout::kHnd ? " HND" : " NHD");
    for (const ChunkSpec& chunk : chunks) {
      text += " (S " + std::to_string(chunk.start) + " C " + std::to_string(chunk.tokens) + " stream " +
              std::to_string(chunk.stream) + ")";
    }
    return text;
  }
};

/// Key and value (kind 1, 2) of a token.
[[nodiscard]] inline float key_value(std::uint64_t kind, std::uint64_t stream, std::int32_t position, std::int32_t head,
                                     std::int32_t dim) {
  return value_of(stream, kind, position, head, dim) +
         1.5F * value_of(stream, kind, 1000000 + position / 48, head, dim);
}

[[nodiscard]] inline float query_value(const KvStepSpec& spec, std::uint64_t stream, std::int32_t position,
                                       std::int32_t local_head, std::int32_t dim) {
  const std::int32_t group = spec.q_heads / spec.kv_heads;
  const std::int32_t head = local_head + spec.first_kv_head * group;
  const std::int32_t kv_head = head / group;
  const std::uint64_t wish =
      mix(stream * 7919 + static_cast<std::uint64_t>(position / 40) * 64 + static_cast<std::uint64_t>(head));
  const auto topic = static_cast<std::int32_t>(wish % static_cast<std::uint64_t>(position / 48 + 1));
  return spec.amplitude *
         (value_of(stream, 0, position, head, dim) + 2.0F * value_of(stream, 1, 1000000 + topic, kv_head, dim));
}

/// Before RoPE: other numbers than after it, so that a mix-up shows.
[[nodiscard]] inline float pre_rope_query_value(const KvStepSpec& spec, std::uint64_t stream, std::int32_t position,
                                                std::int32_t local_head, std::int32_t dim) {
  return 0.5F - query_value(spec, stream, position, local_head, (dim + 1) % spec.head_dim);
}

class KvStep {
 public:
  static constexpr std::int32_t kSparePages = 3;
  static constexpr std::int32_t kSpareRows = 2;  // before each chunk

  explicit KvStep(const KvStepSpec& spec) : spec_(spec), cache_(make_cache(options_of(spec))) {
    shuffle_free_pages();
    std::int32_t tokens = 0;
    for (const ChunkSpec& chunk : spec.chunks) tokens += kSpareRows + chunk.tokens;
    q_.assign(static_cast<std::size_t>(tokens) * heads() * dim(), std::numeric_limits<float>::quiet_NaN());
    q_pre_ = q_;
    std::int32_t row = 0;
    for (const ChunkSpec& chunk : spec.chunks) {
      row += kSpareRows;
      requests_.push_back(append(chunk));
      for (std::int32_t t = 0; t < chunk.tokens; ++t) {
        for (std::int32_t h = 0; h < spec.q_heads; ++h) {
          for (std::int32_t x = 0; x < spec.head_dim; ++x) {
            const std::size_t at = (static_cast<std::size_t>(row + t) * heads() + static_cast<std::size_t>(h)) * dim() +
                                   static_cast<std::size_t>(x);
            q_[at] = query_value(spec, chunk.stream, chunk.start + t, h, x);
            q_pre_[at] = pre_rope_query_value(spec, chunk.stream, chunk.start + t, h, x);
          }
        }
      }
      chunks_.push_back({row, chunk.tokens, chunk.start, nullptr});
      row += chunk.tokens;
    }
    for (std::size_t b = 0; b < chunks_.size(); ++b) chunks_[b].page_table = page_table(b).data();
  }

  KvStep(const KvStep&) = delete;
  KvStep& operator=(const KvStep&) = delete;

  [[nodiscard]] SelectInput select_input() const {
    SelectInput input;
    input.chunks = chunks_;
    input.q = contiguous_rows<const float>(q_.data(), static_cast<std::int32_t>(q_.size() / (heads() * dim())),
                                           spec_.q_heads, spec_.head_dim);
    input.summaries = cache_.summaries(0);
    input.page_tokens = spec_.page_tokens;
    input.softmax_scale = scale();
    input.kv = cache_.layer(0);
    input.forced = {0, 0};
    input.q_pre = contiguous_rows<const float>(q_pre_.data(), input.q.tokens, spec_.q_heads, spec_.head_dim);
    return input;
  }
  [[nodiscard]] PageMassInput mass_input(std::int32_t block_tokens) const {
    const SelectInput input = select_input();
    return {.chunks = input.chunks,
            .q = input.q,
            .kv = input.kv,
            .softmax_scale = input.softmax_scale,
            .block_tokens = block_tokens};
  }

  [[nodiscard]] const KvStepSpec& spec() const { return spec_; }
  [[nodiscard]] PagedKvCache& cache() { return cache_; }
  [[nodiscard]] RequestId request(std::size_t chunk) const { return requests_[chunk]; }
  [[nodiscard]] std::vector<ChunkView>& chunks() { return chunks_; }
  [[nodiscard]] float scale() const { return 1.0F / std::sqrt(static_cast<float>(spec_.head_dim)); }
  [[nodiscard]] std::span<const std::int32_t> page_table(std::size_t chunk) const {
    return cache_.page_table(requests_[chunk]).value();
  }
  [[nodiscard]] float* query(std::int32_t chunk, std::int32_t token, std::int32_t head) {
    const auto row = static_cast<std::size_t>(chunks_[static_cast<std::size_t>(chunk)].q_begin + token);
    return q_.data() + (row * heads() + static_cast<std::size_t>(head)) * dim();
  }
  /// The key as the cache stores it.
  [[nodiscard]] float key(std::size_t chunk, std::int32_t position, std::int32_t kv_head, std::int32_t d) const {
    const PagedKvView kv = cache_.layer(0);
    const std::int32_t page = page_table(chunk)[static_cast<std::size_t>(position / spec_.page_tokens)];
    return stored(kv, kv.k, kv.offset(page, position % spec_.page_tokens, kv_head) + d);
  }

 private:
  static PagedKvOptions options_of(const KvStepSpec& spec) {
    PagedKvOptions options{.num_layers = 1, .num_kv_heads = spec.kv_heads, .head_dim = spec.head_dim};
    options.page_tokens = spec.page_tokens;
    options.num_pages = kSparePages;
    for (const ChunkSpec& chunk : spec.chunks) {
      options.num_pages += (chunk.start + chunk.tokens + spec.page_tokens - 1) / spec.page_tokens;
    }
    options.dtype = spec.dtype;
    options.layout = spec.layout;
    options.summaries = spec.summaries;
    return options;
  }

  // One request a page, filled with NaN, released in random order: the free list hands the pages out in that order.
  void shuffle_free_pages() {
    std::vector<RequestId> owners;
    Rows rows(spec_.page_tokens, spec_.kv_heads, spec_.head_dim);
    for (std::int32_t page = 0; page < cache_.options().num_pages; ++page) {
      owners.push_back(cache_.add_request());
      write(owners.back(), rows, rows, rows);
    }
    std::shuffle(owners.begin(), owners.end(), std::mt19937_64(spec_.page_seed));
    for (const RequestId owner : owners) expect_ok(cache_.release(owner));
  }

  RequestId append(const ChunkSpec& chunk) {
    const RequestId request = cache_.add_request();
    for (std::int32_t begin = 0; begin < chunk.start + chunk.tokens;) {
      std::int32_t tokens = begin < chunk.start ? chunk.start - begin : chunk.tokens;
      if (begin < chunk.start && spec_.append_tokens > 0) tokens = std::min(tokens, spec_.append_tokens);
      Rows k(tokens, spec_.kv_heads, spec_.head_dim);
      Rows v(tokens, spec_.kv_heads, spec_.head_dim);
      Rows k_pre(tokens, spec_.kv_heads, spec_.head_dim);
      for (std::int32_t t = 0; t < tokens; ++t) {
        for (std::int32_t h = 0; h < spec_.kv_heads; ++h) {
          for (std::int32_t x = 0; x < spec_.head_dim; ++x) {
            const std::uint64_t stream = chunk.stream + (begin + t >= spec_.changed_from ? 5000 : 0);
            k.at(t, h, x) = key_value(1, stream, begin + t, spec_.first_kv_head + h, x);
            v.at(t, h, x) = key_value(2, stream, begin + t, spec_.first_kv_head + h, x);
            k_pre.at(t, h, x) = key_value(3, stream, begin + t, spec_.first_kv_head + h, x);
          }
        }
      }
      write(request, k, v, k_pre);
      begin += tokens;
    }
    return request;
  }

  void write(RequestId request, const Rows& k, const Rows& v, const Rows& k_pre) {
    const std::int32_t position = cache_.length(request).value();
    expect_ok(cache_.extend(request, k.tokens()));
    expect_ok(cache_.write(request, 0, position, k.view(), v.view(), pool_, k_pre.view()));
  }

  [[nodiscard]] std::size_t heads() const { return static_cast<std::size_t>(spec_.q_heads); }
  [[nodiscard]] std::size_t dim() const { return static_cast<std::size_t>(spec_.head_dim); }

  KvStepSpec spec_;
  ThreadPool pool_{1};
  PagedKvCache cache_;
  std::vector<float> q_;             // [T, Hq, D]
  std::vector<float> q_pre_;         // [T, Hq, D]  before RoPE
  std::vector<RequestId> requests_;  // [B]
  std::vector<ChunkView> chunks_;    // [B]
};

/// Random steps that a selector must survive: every G, ragged edges, chunks inside one page, no past, no tokens.
[[nodiscard]] inline KvStepSpec random_kv_step(std::uint64_t seed) {
  Random random(seed * 2654435761U + 1);
  const auto pick = [&](std::initializer_list<std::int32_t> values) {
    return *(values.begin() + random.integer(0, static_cast<std::int32_t>(values.size()) - 1));
  };
  KvStepSpec spec;
  const std::int32_t group = pick({1, 2, 4, 7, 8});
  spec.kv_heads = random.integer(1, 2);
  spec.q_heads = group * spec.kv_heads;
  spec.head_dim = pick({8, 24, 64});
  spec.page_tokens = pick({16, 32, 64, 128});
  spec.dtype = random.integer(0, 1) == 0 ? DType::kF32 : DType::kBF16;
  spec.layout = random.integer(0, 1) == 0 ? KvLayout::kHnd : KvLayout::kNhd;
  spec.page_seed = random.bits();
  spec.append_tokens = pick({0, 0, 17, 100});
  const std::int32_t num_chunks = random.integer(1, 3);
  for (std::int32_t b = 0; b < num_chunks; ++b) {
    const std::int32_t page = spec.page_tokens;
    const std::int32_t past = random.integer(0, 9) * page + pick({0, 1, page - 1, random.integer(0, page - 1)});
    spec.chunks.push_back({past, pick({0, 1, 5, page, random.integer(1, 2 * page), 130}),
                           static_cast<std::uint64_t>(random.integer(1, 1000))});
  }
  return spec;
}

}  // namespace compact::testing
