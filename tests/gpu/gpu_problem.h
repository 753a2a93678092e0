/// Generated attention problems for the GPU: logical content first, then its place in a cache of any layout.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "compact/attention_cuda.h"
#include "src/core/bf16.h"
#include "src/core/f16.h"
#include "tests/gpu/device_buffer.h"

namespace compact::testing {

inline float from_bits(DType dtype, std::uint16_t bits) {
  return dtype == DType::kF16 ? to_float(F16{bits}) : to_float(Bf16{bits});
}
inline std::uint16_t to_bits(DType dtype, float value) {
  return dtype == DType::kF16 ? to_f16(value).bits : to_bf16(value).bits;
}

/// Draws that are the same with every standard library.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  std::int32_t below(std::int32_t n) { return static_cast<std::int32_t>(engine_() % static_cast<std::uint64_t>(n)); }
  bool chance(double p) { return static_cast<double>(engine_() >> 11) < p * 9007199254740992.0; }
  std::int32_t pick(std::initializer_list<std::int32_t> values) {
    return values.begin()[below(static_cast<std::int32_t>(values.size()))];
  }
  float normal() {  // sum of four uniforms: close enough, and fast
    const std::uint64_t x = engine_();
    const auto sum = static_cast<float>((x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48));
    return (sum - 131070.0F) * (1.0F / 37837.0F);
  }
  template <class T>
  void shuffle(std::vector<T>& values) {
    for (std::size_t i = values.size(); i > 1; --i) {
      std::swap(values[i - 1], values[static_cast<std::size_t>(below(static_cast<std::int32_t>(i)))]);
    }
  }

 private:
  std::mt19937_64 engine_;
};

struct Request {
  std::int32_t start = 0;  // S
  std::int32_t chunk = 0;  // C
};

struct Shape {
  std::uint32_t seed = 0;
  std::int32_t num_kv_heads = 1;    // Hkv
  std::int32_t group = 4;           // G
  std::int32_t heads_per_unit = 4;  // divides G
  std::int32_t head_dim = 128;      // D
  DType dtype = DType::kBF16;
  std::vector<Request> requests = {};
  double density = 0.5;
  std::int32_t span_tokens = 0;       // 0: one unit per chunk
  std::int32_t granule_tokens = 256;  // selection works on blocks of so many tokens: a multiple of every P in use
  float q_factor = 1;

  std::int32_t num_q_heads() const { return num_kv_heads * group; }
  std::string text() const {
    std::string list;
    for (const Request& r : requests) list += fmt::format(" ({}, {})", r.start, r.chunk);
    return fmt::format("seed {} Hkv {} G {} heads_per_unit {} D {} {} density {} span {} (S, C):{}", seed, num_kv_heads,
                       group, heads_per_unit, head_dim, dtype_name(dtype), density, span_tokens, list);
  }
};

enum class Layout { kHnd, kNhd, kInterleavedHnd, kInterleavedNhd };

struct Placement {
  std::int32_t page_tokens = 128;  // P
  Layout layout = Layout::kHnd;
  std::uint32_t page_seed = 1;  // order of physical pages; 0: reversed
  float poison = NAN;           // what spare pages and tail rows hold
  std::int32_t spare_pages = 3;
  bool share_lists = false;  // equal lists are stored once
};

/// What one unit reads, before pages: blocks of granule_tokens of the past, then everything from the block that the
/// chunk starts in.
struct UnitPlan {
  std::int32_t request = 0;
  std::int32_t kv_head = 0;
  std::int32_t q_head = 0;
  std::int32_t first_query = 0;  // within the chunk
  std::int32_t q_len = 0;
  std::vector<std::int32_t> blocks;
};

class Problem {
 public:
  Shape shape;
  std::vector<std::uint16_t> q;               // [T, Hq, D]
  std::vector<std::vector<std::uint16_t>> k;  // [B][L, Hkv, D]
  std::vector<std::vector<std::uint16_t>> v;
  std::vector<std::int32_t> q_begin;  // [B]
  std::vector<UnitPlan> units;
  std::int32_t num_q_tokens = 0;  // T, with rows of no unit at the end

  explicit Problem(const Shape& s) : shape(s) {
    Random random(s.seed * 0x9e3779b97f4a7c15ULL + 1);
    const std::int64_t row = std::int64_t{s.num_kv_heads} * s.head_dim;
    for (const Request& request : s.requests) {
      q_begin.push_back(num_q_tokens);
      num_q_tokens += request.chunk;
      const auto size = static_cast<std::size_t>((request.start + request.chunk) * row);
      k.emplace_back(size);
      v.emplace_back(size);
      for (std::uint16_t& x : k.back()) x = to_bits(s.dtype, random.normal());
      for (std::uint16_t& x : v.back()) x = to_bits(s.dtype, random.normal());
    }
    num_q_tokens += 2;
    q.resize(static_cast<std::size_t>(std::int64_t{num_q_tokens} * s.num_q_heads() * s.head_dim));
    for (std::uint16_t& x : q) x = to_bits(s.dtype, random.normal() * s.q_factor);
    for (std::size_t b = 0; b < s.requests.size(); ++b) {
      for (std::int32_t head = 0; head < s.num_q_heads(); head += s.heads_per_unit) {
        add_units(random, static_cast<std::int32_t>(b), head);
      }
    }
  }

  std::int32_t context(std::int32_t b) const {
    const Request& r = shape.requests[static_cast<std::size_t>(b)];
    return r.start + r.chunk;
  }

 private:
  void add_units(Random& random, std::int32_t b, std::int32_t head) {
    const Request& request = shape.requests[static_cast<std::size_t>(b)];
    std::vector<std::int32_t> blocks;
    for (std::int32_t done = 0;;) {
      const std::int32_t span =
          shape.span_tokens == 0 ? request.chunk : std::min(shape.span_tokens, request.chunk - done);
      blocks.clear();
      for (std::int32_t j = 0; j < request.start / shape.granule_tokens; ++j) {
        if (random.chance(shape.density)) blocks.push_back(j);
      }
      units.push_back({b, head / shape.group, head, done, span, blocks});
      done += span;
      if (done >= request.chunk) return;
    }
  }
};

/// A problem in device memory. The views are ready for attend_cuda.
class DeviceProblem {
 public:
  CudaAttentionInput input;
  std::vector<AttentionUnit> units;
  std::vector<std::int32_t> page_ids;
  std::vector<float> host_k, host_v;  // the cache as fp32, same offsets: for the CPU reference

  DeviceProblem(const Problem& p, const Placement& place, bool keep_host_cache = false) {
    const Shape& s = p.shape;
    make_tables(p, place);
    make_lists(p, place);
    PagedKvView& kv = input.kv;
    kv = {.dtype = s.dtype,
          .num_pages = num_pages_,
          .num_kv_heads = s.num_kv_heads,
          .page_tokens = place.page_tokens,
          .head_dim = s.head_dim};
    const std::int64_t d = s.head_dim, heads = s.num_kv_heads, tokens = place.page_tokens;
    const bool nhd = place.layout == Layout::kNhd || place.layout == Layout::kInterleavedNhd;
    const bool interleaved = place.layout == Layout::kInterleavedHnd || place.layout == Layout::kInterleavedNhd;
    kv.token_stride = nhd ? heads * d : d;
    kv.head_stride = nhd ? d : tokens * d;
    kv.page_stride = heads * tokens * d * (interleaved ? 2 : 1);
    const std::int64_t plane = interleaved ? heads * tokens * d : kv.page_stride * num_pages_;

    const std::uint16_t poison = to_bits(s.dtype, place.poison);
    std::vector<std::uint16_t> cache(static_cast<std::size_t>(2 * heads * tokens * d * num_pages_), poison);
    for (std::size_t b = 0; b < tables_.size(); ++b) {
      for (std::int32_t x = 0; x < p.context(static_cast<std::int32_t>(b)); ++x) {
        const std::int32_t page = tables_[b][static_cast<std::size_t>(x / place.page_tokens)];
        for (std::int32_t h = 0; h < s.num_kv_heads; ++h) {
          const std::int64_t to = kv.offset(page, x % place.page_tokens, h);
          const std::int64_t from = (std::int64_t{x} * heads + h) * d;
          std::copy_n(p.k[b].begin() + from, d, cache.begin() + to);
          std::copy_n(p.v[b].begin() + from, d, cache.begin() + to + plane);
        }
      }
    }
    cache_ = DeviceBuffer(cache);
    kv.k = cache_.as<std::uint16_t>();
    kv.v = cache_.as<std::uint16_t>() + plane;
    if (keep_host_cache) {
      host_k.reserve(cache.size());
      for (const std::uint16_t x : cache) host_k.push_back(from_bits(s.dtype, x));
      host_v.assign(host_k.begin() + plane, host_k.end());
    }

    q_ = DeviceBuffer(p.q);
    units_ = DeviceBuffer(units);
    ids_ = DeviceBuffer(page_ids);
    input.q = q_.data();
    input.num_q_tokens = p.num_q_tokens;
    input.num_q_heads = s.num_q_heads();
    input.q_head_stride = s.head_dim;
    input.q_token_stride = std::int64_t{s.num_q_heads()} * s.head_dim;
    input.units = units_.as<AttentionUnit>();
    input.page_ids = ids_.as<std::int32_t>();
    input.max_units = static_cast<std::int32_t>(units.size());
    input.heads_per_unit = s.heads_per_unit;
    input.softmax_scale = 1.0F / std::sqrt(static_cast<float>(s.head_dim));
  }

  /// [B][pages]  physical page of each logical page.
  const std::vector<std::vector<std::int32_t>>& tables() const { return tables_; }
  /// After a change of `units` or `page_ids` on the host (same sizes).
  void upload_lists() {
    units_.upload(units);
    ids_.upload(page_ids);
  }
  bool guards_intact() const {
    return cache_.guards_intact() && q_.guards_intact() && units_.guards_intact() && ids_.guards_intact();
  }

 private:
  void make_tables(const Problem& p, const Placement& place) {
    num_pages_ = place.spare_pages;
    for (std::size_t b = 0; b < p.shape.requests.size(); ++b) {
      const std::int32_t pages = (p.context(static_cast<std::int32_t>(b)) + place.page_tokens - 1) / place.page_tokens;
      tables_.emplace_back(static_cast<std::size_t>(pages));
      num_pages_ += pages;
    }
    std::vector<std::int32_t> physical(static_cast<std::size_t>(num_pages_));
    std::iota(physical.begin(), physical.end(), 0);
    if (place.page_seed == 0) {
      std::reverse(physical.begin(), physical.end());
    } else {
      Random random(place.page_seed);
      random.shuffle(physical);
    }
    std::size_t next = 0;
    for (auto& table : tables_) {
      for (std::int32_t& page : table) page = physical[next++];
    }
  }

  void make_lists(const Problem& p, const Placement& place) {
    const Shape& s = p.shape;
    const std::int32_t pages_per_block = s.granule_tokens / place.page_tokens;
    for (std::size_t u = 0; u < p.units.size(); ++u) {
      const UnitPlan& plan = p.units[u];
      const Request& request = s.requests[static_cast<std::size_t>(plan.request)];
      AttentionUnit unit{.q_begin = p.q_begin[static_cast<std::size_t>(plan.request)] + plan.first_query,
                         .q_len = plan.q_len,
                         .q_head = plan.q_head,
                         .kv_head = plan.kv_head,
                         .list_begin = static_cast<std::int32_t>(page_ids.size())};
      unit.past_tokens =
          static_cast<std::int32_t>(plan.blocks.size()) * s.granule_tokens + request.start % s.granule_tokens;
      unit.list_tokens = unit.past_tokens + request.chunk;
      unit.causal_shift = plan.first_query;
      if (place.share_lists && u > 0 && p.units[u - 1].request == plan.request &&
          p.units[u - 1].blocks == plan.blocks) {
        unit.list_begin = units.back().list_begin;
      } else {
        const auto& table = tables_[static_cast<std::size_t>(plan.request)];
        for (const std::int32_t block : plan.blocks) {
          for (std::int32_t j = 0; j < pages_per_block; ++j) {
            page_ids.push_back(table[static_cast<std::size_t>(block * pages_per_block + j)]);
          }
        }
        const std::int32_t first = request.start / s.granule_tokens * pages_per_block;
        page_ids.insert(page_ids.end(), table.begin() + first, table.end());
        page_ids.insert(page_ids.end(), 3, 0x7fffffff);  // nobody may read past a list, nor use what stands there
      }
      units.push_back(unit);
    }
    if (page_ids.empty()) page_ids.push_back(0x7fffffff);
  }

  std::vector<std::vector<std::int32_t>> tables_;  // [B][pages]
  std::int32_t num_pages_ = 0;
  DeviceBuffer cache_, q_, units_, ids_;
};

struct Output {
  std::vector<std::uint16_t> o;  // [T, Hq, D]
  std::vector<float> lse;        // [T, Hq]
  std::int32_t error = 0;
};

}  // namespace compact::testing
