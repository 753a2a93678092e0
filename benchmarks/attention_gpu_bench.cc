// Speed of attention over page lists on one GPU, on a fixed set of shapes.
//
//   attention_gpu_bench [--quick] [--backend sm90|sm80|all] [--filter TEXT] [--json FILE]
//
// Random normal data, physical pages in random order, three input sets in turn. Per row at least 20 runs, queued
// without a stop, each between two CUDA events; the first second only warms up. TFLOP/s count visible (query, key)
// pairs only. "plan us" is prepare + combine, timed alone; it is part of "ms".
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "benchmarks/device_fill.h"
#include "compact/attention_cuda.h"
#include "src/attention/cuda/plan.h"

namespace compact::bench {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  fmt::print(stderr, "attention_gpu_bench: {}: {}\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CA_BENCH_CUDA(expr) check((expr), #expr)

void check(const Status& status) {
  if (status.ok()) return;
  fmt::print(stderr, "attention_gpu_bench: {}\n", status.message());
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
  bool quick = false;  // part of --quick
};

std::vector<Case> fixed_set() {
  std::vector<Case> cases;
  const auto batch = [](std::int32_t b, std::int32_t l) {
    return std::vector<std::int32_t>(static_cast<std::size_t>(b), l);
  };
  const auto add = [&](Case c) { cases.push_back(std::move(c)); };
  for (const std::int32_t l : {8192, 32768, 65536, 131072}) {
    add({.name = fmt::format("B8 Hq16 Hkv4 L{} dense", l),
         .contexts = batch(8, l),
         .q_heads = 16,
         .kv_heads = 4,
         .quick = l == 32768});
    add({.name = fmt::format("B1 Hq32 Hkv8 L{} dense", l), .contexts = batch(1, l), .quick = l != 65536});
  }
  for (const std::int32_t l : {8192, 32768, 131072}) {
    add({.name = fmt::format("B1 Hq32 Hkv8 C512 L{} dense", l), .contexts = batch(1, l), .chunk = 512});
    add({.name = fmt::format("B1 Hq16 Hkv4 L{} dense", l), .contexts = batch(1, l), .q_heads = 16, .kv_heads = 4});
  }
  for (const std::int32_t l : {32768, 131072}) {
    for (const double d : {0.25, 0.10}) {
      for (const bool shared : {true, false}) {
        const char* lists = shared ? "shared" : "per tile";
        add({.name = fmt::format("B8 Hq16 Hkv4 L{} d{:.2f} {}", l, d, lists),
             .contexts = batch(8, l),
             .q_heads = 16,
             .kv_heads = 4,
             .density = d,
             .shared = shared,
             .quick = l == 131072 && shared});
        add({.name = fmt::format("B1 Hq32 Hkv8 L{} d{:.2f} {}", l, d, lists),
             .contexts = batch(1, l),
             .density = d,
             .shared = shared,
             .quick = l == 131072 && shared});
      }
    }
  }
  for (const std::int32_t p : {64, 16}) {
    add({.name = fmt::format("B1 Hq32 Hkv8 L131072 dense P{}", p), .contexts = batch(1, 131072), .page_tokens = p});
    add({.name = fmt::format("B1 Hq32 Hkv8 L131072 d0.10 shared P{}", p),
         .contexts = batch(1, 131072),
         .density = 0.10,
         .page_tokens = p,
         .quick = true});
    add({.name = fmt::format("B8 Hq16 Hkv4 L131072 d0.10 shared P{}", p),
         .contexts = batch(8, 131072),
         .q_heads = 16,
         .kv_heads = 4,
         .density = 0.10,
         .page_tokens = p});
  }
  add({.name = "skewed 2K..32K B8 Hq32 Hkv8 C512 dense",
       .contexts = {2048, 2048, 4096, 4096, 8192, 8192, 16384, 32768},
       .chunk = 512,
       .quick = true});
  add({.name = "TP8 B1 Hq4 Hkv1 L8192 dense", .contexts = {8192}, .q_heads = 4, .kv_heads = 1});
  add({.name = "TP8 B1 Hq4 Hkv1 L32768 dense", .contexts = {32768}, .q_heads = 4, .kv_heads = 1, .quick = true});
  add({.name = "B1 Hq32 Hkv8 L32768 dense D64", .contexts = {32768}, .head_dim = 64, .quick = true});
  add({.name = "B1 Hq32 Hkv8 L32768 dense D256", .contexts = {32768}, .head_dim = 256, .quick = true});
  return cases;
}

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

Lists make_lists(const Case& c, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::int32_t> physical(
      static_cast<std::size_t>(std::accumulate(c.contexts.begin(), c.contexts.end(), 0) / c.page_tokens));
  std::iota(physical.begin(), physical.end(), 0);
  std::shuffle(physical.begin(), physical.end(), random);
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

constexpr int kSets = 3;

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
      in.kv.head_stride = std::int64_t{c.page_tokens} * c.head_dim;
      in.kv.token_stride = c.head_dim;
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

// `run(i)` queues run i; at least 20 runs and 0.15 s, after one untimed round over the sets.
template <class Run>
Times time_runs(Run run) {
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
  for (int i = 0; i < kSets; ++i) run(i);
  record();
  for (int i = 0; i < kSets; ++i) run(i);
  record();
  CA_BENCH_CUDA(cudaDeviceSynchronize());
  const double guess = std::max(0.001, elapsed(0) / kSets);
  const int runs = std::clamp(static_cast<int>(150.0 / guess), 20, 200);
  record();
  for (int i = 0; i < runs; ++i) {
    run(i);
    record();
  }
  CA_BENCH_CUDA(cudaDeviceSynchronize());
  std::vector<double> ms;
  for (std::size_t i = 2; i + 1 < events.size(); ++i) ms.push_back(elapsed(i));
  for (const cudaEvent_t event : events) CA_BENCH_CUDA(cudaEventDestroy(event));
  std::sort(ms.begin(), ms.end());
  return {ms[ms.size() / 2], ms.front()};
}

struct Row {
  std::string name;
  std::string backend;
  Times total;
  Times prepare, combine;
  double tflops = 0;
  double dense_tflops = 0;
};

// O of set 0, for the comparison of the two kernels.
std::vector<std::uint16_t> first_rows(const void* o, std::int64_t elements) {
  std::vector<std::uint16_t> values(static_cast<std::size_t>(std::min<std::int64_t>(elements, 1 << 20)));
  CA_BENCH_CUDA(cudaMemcpy(values.data(), o, values.size() * 2, cudaMemcpyDeviceToHost));
  return values;
}

float bf16_value(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

Row measure(const Case& c, const Inputs& data, CudaBackend backend, std::vector<std::uint16_t>& o_bits) {
  const CudaAttentionOptions options{.backend = backend};
  Result<std::int64_t> bytes = attend_cuda_workspace_bytes(data.inputs[0], options);
  check(bytes.status());
  const Memory workspace(*bytes), o(data.rows * c.head_dim * 2), lse(data.rows * 4);
  const CudaAttentionOutput output{.o = o.data(),
                                   .o_token_stride = std::int64_t{c.q_heads} * c.head_dim,
                                   .o_head_stride = c.head_dim,
                                   .lse = static_cast<float*>(lse.data())};
  const auto run = [&](int i) {
    check(attend_cuda(data.inputs[static_cast<std::size_t>(i % kSets)], output, options, workspace.data(), *bytes,
                      nullptr));
  };
  Row row{.name = c.name, .backend = backend == CudaBackend::kSm90 ? "sm90" : "sm80"};
  row.total = time_runs(run);
  run(0);
  CA_BENCH_CUDA(cudaDeviceSynchronize());
  o_bits = first_rows(o.data(), data.rows * c.head_dim);

  const Result<CudaPlan> plan = plan_attention(data.inputs[0], options);
  check(plan.status());
  const CudaChain chain = make_chain(*plan, data.inputs[0], output, workspace.data(), nullptr);
  row.prepare = time_runs([&](int) { check(launch_chain_prepare(*plan, chain)); });
  row.combine = time_runs([&](int) { check(launch_chain_combine(*plan, chain)); });
  row.tflops = data.lists.flop / row.total.median_ms * 1e-9;
  row.dense_tflops = data.lists.dense_flop / row.total.median_ms * 1e-9;
  return row;
}

double largest_difference(const std::vector<std::uint16_t>& a, const std::vector<std::uint16_t>& b) {
  double largest = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double difference = std::abs(double{bf16_value(a[i])} - bf16_value(b[i]));
    if (!(difference <= largest)) largest = difference;  // a NaN shows
  }
  return largest;
}

void write_json(const char* path, const std::vector<Row>& rows) {
  std::FILE* file = std::fopen(path, "w");
  if (file == nullptr) {
    fmt::print(stderr, "attention_gpu_bench: cannot write {}\n", path);
    std::exit(1);
  }
  cudaDeviceProp device;
  int driver = 0;
  CA_BENCH_CUDA(cudaGetDeviceProperties(&device, 0));
  CA_BENCH_CUDA(cudaDriverGetVersion(&driver));
  fmt::print(file, "{{\"device\": \"{}\", \"driver_cuda\": {}, \"compiled_cuda\": {}, \"rows\": [\n", device.name,
             driver, CUDART_VERSION);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Row& r = rows[i];
    fmt::print(
        file,
        "  {{\"name\": \"{}\", \"backend\": \"{}\", \"ms_median\": {:.5f}, \"ms_min\": {:.5f}, \"tflops\": {:.1f}, "
        "\"effective_dense_tflops\": {:.1f}, \"prepare_ms\": {:.5f}, \"combine_ms\": {:.5f}}}{}\n",
        r.name, r.backend, r.total.median_ms, r.total.min_ms, r.tflops, r.dense_tflops, r.prepare.median_ms,
        r.combine.median_ms, i + 1 < rows.size() ? "," : "");
  }
  fmt::print(file, "]}}\n");
  std::fclose(file);
}

int run(int argc, char** argv) {
  bool quick = false;
  std::string backends = "all", filter, json;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const auto value = [&] {
      if (i + 1 >= argc) {
        fmt::print(stderr, "attention_gpu_bench: {} needs a value\n", flag);
        std::exit(2);
      }
      return std::string(argv[++i]);
    };
    if (flag == "--quick")
      quick = true;
    else if (flag == "--backend")
      backends = value();
    else if (flag == "--filter")
      filter = value();
    else if (flag == "--json")
      json = value();
    else {
      fmt::print(stderr, "attention_gpu_bench: unknown option '{}'; allowed: --quick --backend --filter --json\n",
                 flag);
      return 2;
    }
  }
  std::vector<CudaBackend> chosen;
  if (backends == "sm90" || backends == "all") chosen.push_back(CudaBackend::kSm90);
  if (backends == "sm80" || backends == "all") chosen.push_back(CudaBackend::kSm80);
  if (chosen.empty()) {
    fmt::print(stderr, "attention_gpu_bench: --backend is '{}'; allowed: sm90, sm80, all\n", backends);
    return 2;
  }

  std::vector<Row> rows;
  bool warm = false;
  for (const Case& c : fixed_set()) {
    if ((quick && !c.quick) || c.name.find(filter) == std::string::npos) continue;
    const Inputs data(c);
    CA_BENCH_CUDA(cudaDeviceSynchronize());
    std::vector<std::uint16_t> first, other;
    for (const CudaBackend backend : chosen) {
      if (!warm) {
        for (int i = 0; i < 3; ++i) (void)measure(c, data, backend, other);  // clocks, code upload
        warm = true;
      }
      const Row row = measure(c, data, backend, backend == chosen.front() ? first : other);
      fmt::print(
          "{:44} {} {:9.4f} ms (min {:9.4f}) {:6.1f} TFLOP/s  dense-equivalent {:7.1f}  plan {:5.1f} + {:5.1f} us",
          row.name, row.backend, row.total.median_ms, row.total.min_ms, row.tflops, row.dense_tflops,
          row.prepare.median_ms * 1e3, row.combine.median_ms * 1e3);
      if (backend != chosen.front()) fmt::print("  max |sm90 - sm80| {:.4f}", largest_difference(first, other));
      fmt::print("\n");
      std::fflush(stdout);
      rows.push_back(row);
    }
  }
  if (!json.empty()) write_json(json.c_str(), rows);
  return 0;
}

}  // namespace
}  // namespace compact::bench

int main(int argc, char** argv) { return compact::bench::run(argc, argv); }
