// Speed of attention over page lists on one GPU, on a fixed set of shapes.
//
//   attention_gpu_bench [--quick] [--backend sm90|sm80|all] [--filter TEXT] [--json FILE]
//
// Random normal data, physical pages in random order, three input sets in turn. Per row at least 20 runs, queued
// without a stop, each between two CUDA events; the first second only warms up. TFLOP/s count visible (query, key)
// pairs only. "plan us" is prepare + combine, timed alone; it is part of "ms".
#include <fmt/format.h>

#include <cstdio>
#include <string>
#include <vector>

#include "engine/bench/cuda/gpu_bench.h"
#include "src/attention/cuda/plan.h"

namespace compact::bench {
namespace {

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

struct Row {
  std::string name;
  std::string backend;
  Times total = {};
  Times prepare = {}, combine = {};
  double tflops = 0;
  double dense_tflops = 0;
};

Row measure(const Case& c, const Inputs& data, CudaBackend backend, std::vector<float>& o_values) {
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
  o_values = first_values(o.data(), data.rows * c.head_dim);

  const Result<CudaPlan> plan = plan_attention(data.inputs[0], options);
  check(plan.status());
  const CudaChain chain = make_chain(*plan, data.inputs[0], output, options, workspace.data());
  row.prepare = time_runs([&](int) { check(launch_chain_prepare(*plan, chain, nullptr)); });
  row.combine = time_runs([&](int) { check(launch_chain_combine(*plan, chain, nullptr)); });
  row.tflops = data.lists.flop / row.total.median_ms * 1e-9;
  row.dense_tflops = data.lists.dense_flop / row.total.median_ms * 1e-9;
  return row;
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
    std::vector<float> first, other;
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
