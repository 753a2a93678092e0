// What the GPU benchmarks share: shapes, generated inputs, timing.
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "compact/attention_cuda.h"
#include "engine/bench/cuda/device_fill.h"

namespace compact::bench {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  fmt::print(stderr, "{}: {}\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CA_BENCH_CUDA(expr) check((expr), #expr)

inline void check(const Status& status) {
  if (status.ok()) return;
  fmt::print(stderr, "{}\n", status.message());
  std::exit(1);
}

struct Case {
  std::string name;
  std::vector<std::int32_t> contexts;  // L of each request
  std::int32_t q_heads = 32;           // Hq
  std::int32_t kv_heads = 8;           // Hkv
  std::int32_t chunk = 1024;           // C
  double density = 1.0;
  bool shared = true;  // one list per KV head; false: one per 128 packed rows
  std::int32_t page_tokens = 128;
  std::int32_t head_dim = 128;
  bool permuted_pages = true;  // physical pages in random order
  bool nhd = false;            // cache [pages, P, Hkv, D] instead of [pages, Hkv, P, D]
  bool quick = false;          // part of --quick
};

class Memory {
 public:
  explicit Memory(std::int64_t bytes) { CA_BENCH_CUDA(cudaMalloc(&data_, static_cast<std::size_t>(bytes))); }
  template <class T>
  explicit Memory(const std::vector<T>& values) : Memory(static_cast<std::int64_t>(values.size() * sizeof(T))) {
    CA_BENCH_CUDA(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  Memory(Memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  ~Memory() { cudaFree(data_); }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Lists over the page tables of one input set: random past pages in ascending order, then the chunk's.
struct Lists {
  std::vector<AttentionUnit> units;
  std::vector<std::int32_t> page_ids;
  double flop = 0;        // 4 D per visible (query, key) pair
  double dense_flop = 0;  // the same if every page were listed
};

inline Lists make_lists(const Case& c, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::int32_t> physical(
      static_cast<std::size_t>(std::accumulate(c.contexts.begin(), c.contexts.end(), 0) / c.page_tokens));
  std::iota(physical.begin(), physical.end(), 0);
  if (c.permuted_pages) std::shuffle(physical.begin(), physical.end(), random);
  Lists lists;
  const std::int32_t group = c.q_heads / c.kv_heads;
  const std::int32_t span = c.shared ? c.chunk : std::max(1, 128 / group);
  std::int32_t first_page = 0, q_begin = 0;
  std::vector<std::int32_t> past;
  for (const std::int32_t l : c.contexts) {
    const std::int32_t past_pages = (l - c.chunk) / c.page_tokens;
    for (std::int32_t g = 0; g < c.kv_heads; ++g) {
      for (std::int32_t done = 0; done < c.chunk; done += span) {
        past.resize(static_cast<std::size_t>(past_pages));
        std::iota(past.begin(), past.end(), 0);
        if (c.density < 1) {
          std::shuffle(past.begin(), past.end(), random);
          past.resize(static_cast<std::size_t>(std::lround(c.density * past_pages)));
          std::sort(past.begin(), past.end());
        }
        AttentionUnit unit{.q_begin = q_begin + done, .q_len = span, .q_head = g * group, .kv_head = g};
        unit.list_begin = static_cast<std::int32_t>(lists.page_ids.size());
        unit.past_tokens = static_cast<std::int32_t>(past.size()) * c.page_tokens;
        unit.list_tokens = unit.past_tokens + c.chunk;
        unit.causal_shift = done;
        for (const std::int32_t j : past) lists.page_ids.push_back(physical[static_cast<std::size_t>(first_page + j)]);
        for (std::int32_t j = past_pages; j < l / c.page_tokens; ++j) {
          lists.page_ids.push_back(physical[static_cast<std::size_t>(first_page + j)]);
        }
        lists.units.push_back(unit);
        const double causal = 1.0 * span * (done + (span + 1) / 2.0);
        lists.flop += 4.0 * c.head_dim * group * (1.0 * span * unit.past_tokens + causal);
        lists.dense_flop += 4.0 * c.head_dim * group * (1.0 * span * (l - c.chunk) + causal);
      }
    }
    first_page += l / c.page_tokens;
    q_begin += c.chunk;
  }
  return lists;
}

inline constexpr int kSets = 3;

// Everything of one case in device memory; three sets that share nothing.
struct Inputs {
  std::vector<CudaAttentionInput> inputs;  // [kSets]
  std::vector<Memory> memory;
  Lists lists;  // of set 0
  std::int64_t rows = 0;

  explicit Inputs(const Case& c) {
    const std::int32_t pages = std::accumulate(c.contexts.begin(), c.contexts.end(), 0) / c.page_tokens;
    const std::int64_t page_stride = std::int64_t{c.kv_heads} * c.page_tokens * c.head_dim;
    const auto tokens = static_cast<std::int32_t>(c.contexts.size()) * c.chunk;
    rows = std::int64_t{tokens} * c.q_heads;
    const auto random_tensor = [&](std::int64_t elements, std::uint64_t seed) {
      memory.emplace_back(elements * 2);
      CA_BENCH_CUDA(fill_normal(memory.back().data(), elements, DType::kBF16, seed << 40));
      return memory.back().data();
    };
    for (int set = 0; set < kSets; ++set) {
      const auto seed = static_cast<std::uint64_t>(3 * set + 1);
      Lists drawn = make_lists(c, seed);
      CudaAttentionInput in;
      in.q = random_tensor(rows * c.head_dim, seed);
      in.q_head_stride = c.head_dim;
      in.q_token_stride = std::int64_t{c.q_heads} * c.head_dim;
      in.num_q_tokens = tokens;
      in.num_q_heads = c.q_heads;
      in.kv.k = random_tensor(page_stride * pages, seed + 1);
      in.kv.v = random_tensor(page_stride * pages, seed + 2);
      in.kv.dtype = DType::kBF16;
      in.kv.num_pages = pages;
      in.kv.num_kv_heads = c.kv_heads;
      in.kv.page_tokens = c.page_tokens;
      in.kv.head_dim = c.head_dim;
      in.kv.page_stride = page_stride;
      in.kv.head_stride = c.nhd ? c.head_dim : std::int64_t{c.page_tokens} * c.head_dim;
      in.kv.token_stride = c.nhd ? std::int64_t{c.kv_heads} * c.head_dim : c.head_dim;
      memory.emplace_back(drawn.units);
      in.units = static_cast<const AttentionUnit*>(memory.back().data());
      memory.emplace_back(drawn.page_ids);
      in.page_ids = static_cast<const std::int32_t*>(memory.back().data());
      in.max_units = static_cast<std::int32_t>(drawn.units.size());
      in.heads_per_unit = c.q_heads / c.kv_heads;
      in.softmax_scale = 1.0F / std::sqrt(static_cast<float>(c.head_dim));
      inputs.push_back(in);
      if (set == 0) lists = std::move(drawn);
    }
  }
};

struct Times {
  double median_ms = 0;
  double min_ms = 0;
};

// Holds the default stream while its next commands are queued. Without it a run of a few microseconds is timed as long
// as the CPU takes to launch it.
class Hold {
 public:
  Hold() {
    CA_BENCH_CUDA(cudaLaunchHostFunc(
        nullptr,
        [](void* released) {
          while (!static_cast<std::atomic<bool>*>(released)->load()) std::this_thread::yield();
        },
        &released_));
  }
  void release() { released_ = true; }

 private:
  std::atomic<bool> released_ = false;
};

// Times run(i), each between two events; before(i) is queued ahead of it and not timed. Runs are queued in batches
// while the stream is held, so that the GPU never waits for the CPU. At least 20 runs and 0.15 s, after two untimed
// rounds over the sets.
template <class Before, class Run>
Times time_runs(Before before, Run run) {
  std::vector<cudaEvent_t> events;
  const auto record = [&] {
    events.emplace_back();
    CA_BENCH_CUDA(cudaEventCreate(&events.back()));
    CA_BENCH_CUDA(cudaEventRecord(events.back(), nullptr));
  };
  const auto elapsed = [&](std::size_t i) {
    float ms = 0;
    CA_BENCH_CUDA(cudaEventElapsedTime(&ms, events[i], events[i + 1]));
    return double{ms};
  };
  const auto round = [&] {
    for (int i = 0; i < kSets; ++i) before(i), run(i);
  };
  round();
  record();
  round();
  record();
  CA_BENCH_CUDA(cudaDeviceSynchronize());
  const double guess = std::max(0.001, elapsed(0) / kSets);
  const int runs = std::clamp(static_cast<int>(150.0 / guess), 20, 200);
  constexpr int kBatch = 20;  // its launches fit the queue of a stream: queueing never blocks
  std::deque<Hold> holds;
  for (int i = 0; i < runs; ++i) {
    if (i % kBatch == 0) holds.emplace_back();
    before(i);
    record();
    run(i);
    record();
    if (i % kBatch == kBatch - 1 || i + 1 == runs) holds.back().release();
  }
  CA_BENCH_CUDA(cudaDeviceSynchronize());
  std::vector<double> ms;
  for (std::size_t i = 2; i < events.size(); i += 2) ms.push_back(elapsed(i));
  for (const cudaEvent_t event : events) CA_BENCH_CUDA(cudaEventDestroy(event));
  std::sort(ms.begin(), ms.end());
  return {ms[ms.size() / 2], ms.front()};
}

template <class Run>
Times time_runs(Run run) {
  return time_runs([](int) {}, run);
}

// The first values of a bf16 tensor on the device.
inline std::vector<float> first_values(const void* data, std::int64_t elements) {
  std::vector<std::uint16_t> bits(static_cast<std::size_t>(std::min<std::int64_t>(elements, 1 << 20)));
  CA_BENCH_CUDA(cudaMemcpy(bits.data(), data, bits.size() * 2, cudaMemcpyDeviceToHost));
  std::vector<float> values;
  values.reserve(bits.size());
  for (const std::uint16_t b : bits) values.push_back(std::bit_cast<float>(std::uint32_t{b} << 16));
  return values;
}

// NaN if there is one on either side.
inline double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double difference = std::abs(double{a[i]} - double{b[i]});
    if (std::isnan(difference)) return difference;
    largest = std::max(largest, difference);
  }
  return largest;
}

}  // namespace compact::bench
