/// Generated attention problems, and the oracle O1 that knows nothing of list coordinates.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "compact/attention.h"
#include "src/core/bf16.h"

namespace compact::testing {

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kUntouched = -12345.5F;  // what O and LSE hold before a call

/// Draws that are the same with every standard library.
class Random {
 public:
  explicit Random(std::uint32_t seed) : engine_(seed) {}
  std::int32_t below(std::int32_t n) { return static_cast<std::int32_t>(engine_() % static_cast<std::uint32_t>(n)); }
  std::int32_t between(std::int32_t low, std::int32_t high) { return low + below(high - low + 1); }
  bool chance(double p) { return static_cast<double>(engine_()) < p * 4294967296.0; }
  float uniform() { return static_cast<float>(static_cast<double>(engine_()) / 2147483648.0 - 1.0); }  // [-1, 1)
  template <class T, std::size_t N>
  T pick(const T (&values)[N]) {
    return values[below(static_cast<std::int32_t>(N))];
  }
  template <class T>
  void shuffle(std::vector<T>& values) {
    for (std::size_t i = values.size(); i > 1; --i) {
      std::swap(values[i - 1], values[static_cast<std::size_t>(below(static_cast<std::int32_t>(i)))]);
    }
  }

 private:
  std::mt19937 engine_;
};

struct Shape {
  std::uint32_t seed = 0;
  std::int32_t num_kv_heads = 1;  // Hkv
  std::int32_t group = 1;         // G
  std::int32_t heads_per_unit = 1;
  std::int32_t head_dim = 64;     // D
  std::int32_t page_tokens = 16;  // P
  DType dtype = DType::kF32;
  bool token_major = false;  // NHD
  bool same_keys = false;
  bool correction = false;           // mean correction of the pages that no list names
  float q_factor = 1;                // 80 makes |s q.k| reach about 80
  std::vector<std::int32_t> starts;  // [B]  S of each request
  std::vector<std::int32_t> chunks;  // [B]  C of each request

  [[nodiscard]] std::string text() const {
    std::string requests;
    for (std::size_t b = 0; b < starts.size(); ++b) requests += fmt::format(" (S {}, C {})", starts[b], chunks[b]);
    return fmt::format(
        "seed {} Hkv {} G {} heads_per_unit {} D {} P {} {} {} same_keys {} correction {} q_factor {} B {}:{}", seed,
        num_kv_heads, group, heads_per_unit, head_dim, page_tokens, dtype_name(dtype), token_major ? "NHD" : "HND",
        same_keys, correction, q_factor, starts.size(), requests);
  }
};

inline Shape random_shape(std::uint32_t seed) {
  Random random(seed);
  Shape s;
  s.seed = seed;
  s.group = random.pick({1, 4, 7, 8});
  s.num_kv_heads = random.between(1, 2);
  do s.heads_per_unit = random.between(1, s.group);
  while (s.group % s.heads_per_unit != 0);
  s.head_dim = random.pick({8, 16, 64, 80, 96, 128, 256});
  s.page_tokens = random.pick({16, 32, 64, 128, 256});
  s.dtype = random.pick({DType::kF32, DType::kBF16});
  s.token_major = random.chance(0.5);
  s.same_keys = random.chance(0.05);
  s.q_factor = random.chance(0.15) ? 80.0F : 1.0F;
  s.correction = random.chance(0.3);
  for (std::int32_t b = random.between(1, 3); b > 0; --b) {
    const std::int32_t pages = random.between(0, s.page_tokens >= 128 ? 2 : 6);
    s.starts.push_back(pages * s.page_tokens + (random.chance(0.5) ? random.below(s.page_tokens) : 0));
    s.chunks.push_back(random.pick({0, 1, 1, random.between(2, 15), random.between(16, 90), s.page_tokens}));
  }
  return s;
}

/// Tensors and lists of a shape. Everything that no visible token owns is NaN: spare pages, tail rows, gaps between
/// rows.
struct Problem {
  Shape shape;
  std::vector<float> q, o, lse;
  std::vector<float> k, v;                            // values as stored, fp32
  std::vector<Bf16> k16, v16;                         // the same, if the cache is bf16
  std::vector<std::vector<std::int32_t>> page_table;  // [B][pages]
  std::vector<std::vector<std::int32_t>> logical;     // [U]  logical pages of each unit's list
  std::vector<std::int32_t> request_of_unit;          // [U]
  std::vector<std::int32_t> first_position;           // [U]  absolute position of the unit's first query
  std::vector<AttentionUnit> units;
  std::vector<std::int32_t> page_ids;
  std::vector<float> mean_k, mean_v;  // [num_pages, Hkv, D]  of past pages
  std::vector<std::int32_t> count;    // [num_pages]
  std::vector<DroppedPages> dropped;  // [U]
  std::vector<std::int32_t> dropped_ids;
  AttentionInput input;
  AttentionOutput output;

  Problem(const Problem&) = delete;
  explicit Problem(const Shape& s) : shape(s) {
    Random random(s.seed ^ 0x9e3779b9U);
    const std::int32_t num_pages = make_page_tables(random);
    PagedKvView& kv = input.kv;
    kv = {.dtype = s.dtype,
          .num_pages = num_pages,
          .num_kv_heads = s.num_kv_heads,
          .page_tokens = s.page_tokens,
          .head_dim = s.head_dim};
    const std::int64_t row = s.head_dim + (random.chance(0.3) ? 3 : 0);
    kv.token_stride = s.token_major ? row * s.num_kv_heads : row;
    kv.head_stride = s.token_major ? row : row * s.page_tokens;
    kv.page_stride = row * s.page_tokens * s.num_kv_heads + (random.chance(0.3) ? 5 : 0);
    fill_cache(random);
    make_units(random);
    make_rows(random);
    make_means();
    input.units = units;
    input.page_ids = page_ids;
    input.heads_per_unit = s.heads_per_unit;
    input.softmax_scale = 1.0F / std::sqrt(static_cast<float>(s.head_dim));
  }

  void clear_output() {
    std::fill(o.begin(), o.end(), kUntouched);
    std::fill(lse.begin(), lse.end(), kUntouched);
  }
  [[nodiscard]] std::int32_t num_q_heads() const { return shape.num_kv_heads * shape.group; }
  [[nodiscard]] const float* row_at(const std::vector<float>& cache, std::int32_t b, std::int32_t x,
                                    std::int32_t g) const {
    const auto page = page_table[static_cast<std::size_t>(b)][static_cast<std::size_t>(x / shape.page_tokens)];
    return cache.data() + input.kv.offset(page, x % shape.page_tokens, g);
  }

 private:
  std::int32_t make_page_tables(Random& random) {
    std::int32_t used = 0;
    page_table.resize(shape.starts.size());
    for (std::size_t b = 0; b < shape.starts.size(); ++b) {
      page_table[b].resize(
          static_cast<std::size_t>((shape.starts[b] + shape.chunks[b] + shape.page_tokens - 1) / shape.page_tokens));
      used += static_cast<std::int32_t>(page_table[b].size());
    }
    const std::int32_t num_pages = used + 3;
    std::vector<std::int32_t> physical(static_cast<std::size_t>(num_pages));
    std::iota(physical.begin(), physical.end(), 0);
    random.shuffle(physical);
    std::size_t next = 0;
    for (auto& table : page_table) {
      for (auto& page : table) page = physical[next++];
    }
    return num_pages;
  }

  void fill_cache(Random& random) {
    PagedKvView& kv = input.kv;
    const auto elements = static_cast<std::size_t>(kv.page_stride * kv.num_pages);
    k.assign(elements, kNaN);
    v.assign(elements, kNaN);
    std::vector<float> shared(static_cast<std::size_t>(kv.head_dim));
    for (float& value : shared) value = random.uniform();
    const auto stored = [&](float value) { return kv.dtype == DType::kBF16 ? to_float(to_bf16(value)) : value; };
    for (std::size_t b = 0; b < page_table.size(); ++b) {
      for (std::int32_t x = 0; x < shape.starts[b] + shape.chunks[b]; ++x) {
        for (std::int32_t g = 0; g < kv.num_kv_heads; ++g) {
          const auto at = static_cast<std::size_t>(row_at(k, static_cast<std::int32_t>(b), x, g) - k.data());
          for (std::size_t d = 0; d < static_cast<std::size_t>(kv.head_dim); ++d) {
            k[at + d] = stored(shape.same_keys ? shared[d] : random.uniform());
            v[at + d] = stored(random.uniform());
          }
        }
      }
    }
    kv.k = k.data();
    kv.v = v.data();
    if (kv.dtype != DType::kBF16) return;
    std::transform(k.begin(), k.end(), std::back_inserter(k16), to_bf16);
    std::transform(v.begin(), v.end(), std::back_inserter(v16), to_bf16);
    kv.k = k16.data();
    kv.v = v16.data();
  }

  // Every (KV head, sub-group) cuts the chunk into spans of its own; each span lists a random subset of the past.
  void make_units(Random& random) {
    std::int32_t q_begin = random.below(3);
    for (std::size_t b = 0; b < page_table.size(); ++b) {
      const std::int32_t start = shape.starts[b];
      const std::int32_t chunk = shape.chunks[b];
      const std::int32_t past_pages = start / shape.page_tokens;
      for (std::int32_t head = 0; head < num_q_heads(); head += shape.heads_per_unit) {
        std::int32_t done = 0;
        do {
          const std::int32_t span = random.chance(0.6) ? chunk - done : std::min(chunk - done, random.between(1, 40));
          AttentionUnit unit{.q_begin = q_begin + done,
                             .q_len = span,
                             .q_head = head,
                             .kv_head = head / shape.group,
                             .list_begin = static_cast<std::int32_t>(page_ids.size())};
          std::vector<std::int32_t> pages;
          for (std::int32_t j = 0; j < past_pages; ++j) {
            if (random.chance(0.6)) pages.push_back(j);
          }
          unit.past_tokens = static_cast<std::int32_t>(pages.size()) * shape.page_tokens + start % shape.page_tokens;
          unit.list_tokens = unit.past_tokens + chunk;
          unit.causal_shift = done;
          for (std::int32_t j = past_pages; j < static_cast<std::int32_t>(page_table[b].size()); ++j)
            pages.push_back(j);
          for (const std::int32_t j : pages) page_ids.push_back(page_table[b][static_cast<std::size_t>(j)]);
          units.push_back(unit);
          logical.push_back(pages);
          request_of_unit.push_back(static_cast<std::int32_t>(b));
          first_position.push_back(start + done);
          done += span;
        } while (done < chunk);
      }
      q_begin += chunk + random.below(3);  // rows of no unit between requests
    }
    tokens_ = q_begin + 1;
  }

  // Means of the past pages, and for each unit those that its list leaves out.
  void make_means() {
    const auto dim = static_cast<std::size_t>(shape.head_dim);
    const auto heads = static_cast<std::size_t>(shape.num_kv_heads);
    mean_k.assign(static_cast<std::size_t>(input.kv.num_pages) * heads * dim, kNaN);
    mean_v = mean_k;
    count.assign(static_cast<std::size_t>(input.kv.num_pages), 0);
    for (std::size_t b = 0; b < page_table.size(); ++b) {
      for (std::int32_t j = 0; j < shape.starts[b] / shape.page_tokens; ++j) {
        const auto page = static_cast<std::size_t>(page_table[b][static_cast<std::size_t>(j)]);
        count[page] = shape.page_tokens;
        for (std::size_t i = 0; i < heads * dim; ++i) {
          double sum_k = 0;
          double sum_v = 0;
          for (std::int32_t t = 0; t < shape.page_tokens; ++t) {
            const std::int32_t x = j * shape.page_tokens + t;
            const auto g = static_cast<std::int32_t>(i / dim);
            sum_k += double{row_at(k, static_cast<std::int32_t>(b), x, g)[i % dim]};
            sum_v += double{row_at(v, static_cast<std::int32_t>(b), x, g)[i % dim]};
          }
          mean_k[page * heads * dim + i] = static_cast<float>(sum_k / shape.page_tokens);
          mean_v[page * heads * dim + i] = static_cast<float>(sum_v / shape.page_tokens);
        }
      }
    }
    for (std::size_t u = 0; u < units.size(); ++u) {
      const auto b = static_cast<std::size_t>(request_of_unit[u]);
      dropped.push_back({static_cast<std::int32_t>(dropped_ids.size()), 0});
      for (std::int32_t j = 0; j < shape.starts[b] / shape.page_tokens; ++j) {
        if (std::find(logical[u].begin(), logical[u].end(), j) != logical[u].end()) continue;
        dropped_ids.push_back(page_table[b][static_cast<std::size_t>(j)]);
        ++dropped.back().count;
      }
    }
    if (shape.correction) input.correction = {mean_k.data(), mean_v.data(), count.data(), dropped, dropped_ids};
  }

  void make_rows(Random& random) {
    const std::int64_t head_stride = shape.head_dim + (random.chance(0.3) ? 1 : 0);
    const std::int64_t token_stride = head_stride * num_q_heads() + (random.chance(0.3) ? 7 : 0);
    const auto elements = static_cast<std::size_t>(token_stride * tokens_ + 1);
    q.assign(elements, kNaN);
    o.assign(elements, kUntouched);
    lse.assign(static_cast<std::size_t>(tokens_ * num_q_heads()), kUntouched);
    input.q = {q.data() + 1, tokens_, num_q_heads(), shape.head_dim, token_stride, head_stride};  // + 1: unaligned
    output.o = {o.data() + 1, tokens_, num_q_heads(), shape.head_dim, token_stride, head_stride};
    output.lse = lse.data();
    for (std::int32_t t = 0; t < tokens_; ++t) {
      for (std::int32_t h = 0; h < num_q_heads(); ++h) {
        float* row = q.data() + (input.q.row(t, h) - q.data());
        for (std::int32_t d = 0; d < shape.head_dim; ++d) row[d] = random.uniform() * shape.q_factor;
      }
    }
  }

  std::int32_t tokens_ = 0;
};

/// O and LSE of every (token, head) of some unit, in arithmetic of type Real: {x : page(x) in the list, x <= p}, and
/// the means of the other past pages with mean correction.
template <class Real>
void attend_by_sets(const Problem& problem, std::vector<float>& o /* as output.o */, std::vector<float>& lse) {
  const Shape& s = problem.shape;
  o = std::vector<float>(problem.o.size(), kUntouched);
  lse = std::vector<float>(problem.lse.size(), kUntouched);
  for (std::size_t u = 0; u < problem.units.size(); ++u) {
    const AttentionUnit& unit = problem.units[u];
    const std::int32_t b = problem.request_of_unit[u];
    for (std::int32_t r = 0; r < unit.q_len * s.heads_per_unit; ++r) {
      const std::int32_t token = unit.q_begin + r / s.heads_per_unit;
      const std::int32_t head = unit.q_head + r % s.heads_per_unit;
      const std::int32_t position = problem.first_position[u] + r / s.heads_per_unit;
      const float* q = problem.input.q.row(token, head);
      std::vector<std::int32_t> seen;
      for (std::int32_t x = 0; x <= position; ++x) {
        const auto& pages = problem.logical[u];
        if (std::find(pages.begin(), pages.end(), x / s.page_tokens) != pages.end()) seen.push_back(x);
      }
      std::vector<Real> score;
      Real largest = -std::numeric_limits<Real>::infinity();
      for (const std::int32_t x : seen) {
        const float* k = problem.row_at(problem.k, b, x, unit.kv_head);
        Real dot = 0;
        for (std::int32_t d = 0; d < s.head_dim; ++d) dot += Real(q[d]) * Real(k[d]);
        score.push_back(dot * Real(problem.input.softmax_scale));
        largest = std::max(largest, score.back());
      }
      const std::int32_t num_dropped = s.correction ? problem.dropped[u].count : 0;
      const auto mean_of = [&](const std::vector<float>& means, std::int32_t i) {
        const std::int32_t page = problem.dropped_ids[static_cast<std::size_t>(problem.dropped[u].begin + i)];
        return means.data() + std::int64_t{page * s.num_kv_heads + unit.kv_head} * s.head_dim;
      };
      for (std::int32_t i = 0; i < num_dropped; ++i) {
        Real dot = 0;
        for (std::int32_t d = 0; d < s.head_dim; ++d) dot += Real(q[d]) * Real(mean_of(problem.mean_k, i)[d]);
        score.push_back(dot * Real(problem.input.softmax_scale) + std::log(Real(s.page_tokens)));
        largest = std::max(largest, score.back());
      }
      Real sum = 0;
      std::vector<Real> mixed(static_cast<std::size_t>(s.head_dim), Real(0));
      for (std::size_t i = 0; i < score.size(); ++i) {
        const float* v = i < seen.size() ? problem.row_at(problem.v, b, seen[i], unit.kv_head)
                                         : mean_of(problem.mean_v, static_cast<std::int32_t>(i - seen.size()));
        const Real weight = std::exp(score[i] - largest);
        sum += weight;
        for (std::size_t d = 0; d < mixed.size(); ++d) mixed[d] += weight * Real(v[d]);
      }
      const auto at = static_cast<std::size_t>(problem.output.o.row(token, head) - problem.o.data());
      for (std::size_t d = 0; d < mixed.size(); ++d) o[at + d] = static_cast<float>(mixed[d] / sum);
      lse[static_cast<std::size_t>(token * problem.num_q_heads() + head)] = static_cast<float>(largest + std::log(sum));
    }
  }
}

}  // namespace compact::testing
