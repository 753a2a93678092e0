#include "engine/bench/attention_cuda.h"

#include <fmt/format.h>

#include "engine/bench/cuda/gpu_bench.h"
#include "engine/bench/step_cuda.h"

namespace compact::engine {
namespace {

using bench::Case;
using bench::check;
using bench::Inputs;
using bench::kSets;
using bench::Memory;
using bench::time_runs;

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

Result<AttentionRow> measure(const Case& c, const Inputs& data, CudaBackend kernel, std::vector<float>& o_values) {
  const CudaAttentionOptions options{.backend = kernel};
  CA_ASSIGN_OR_RETURN(const std::int64_t bytes, attend_cuda_workspace_bytes(data.inputs[0], options));
  const Memory workspace(bytes), o(data.rows * c.head_dim * 2), lse(data.rows * 4);
  const CudaAttentionOutput output{.o = o.data(),
                                   .o_token_stride = std::int64_t{c.q_heads} * c.head_dim,
                                   .o_head_stride = c.head_dim,
                                   .lse = static_cast<float*>(lse.data()),
                                   .error = nullptr};
  const auto run = [&](int i) {
    check(attend_cuda(data.inputs[static_cast<std::size_t>(i % kSets)], output, options, workspace.data(), bytes,
                      nullptr));
  };
  const bench::Times total = time_runs(run);
  run(0);
  CA_BENCH_CUDA(cudaDeviceSynchronize());
  o_values = bench::first_values(o.data(), data.rows * c.head_dim);
  AttentionRow row;
  row.name = c.name;
  row.kernel = kernel == CudaBackend::kSm90 ? "sm90" : "sm80";
  row.median_ms = total.median_ms;
  row.min_ms = total.min_ms;
  row.tflops = data.lists.flop / total.median_ms * 1e-9;
  row.dense_tflops = data.lists.dense_flop / total.median_ms * 1e-9;
  return row;
}

}  // namespace

Status bench_attention_cuda(const AttentionBenchOptions& options,
                            const std::function<void(const AttentionRow&)>& done) {
  CA_RETURN_IF_ERROR(cuda_bench_device().status());
  bool warm = false;
  for (const Case& c : fixed_set()) {
    if ((options.quick && !c.quick) || c.name.find(options.filter) == std::string::npos) continue;
    const Inputs data(c);
    CA_BENCH_CUDA(cudaDeviceSynchronize());
    std::vector<float> first, other;
    for (const CudaBackend kernel : options.kernels) {
      for (int i = 0; i < 3 && !warm; ++i) CA_RETURN_IF_ERROR(measure(c, data, kernel, other).status());  // clocks
      warm = true;
      const bool is_first = kernel == options.kernels.front();
      CA_ASSIGN_OR_RETURN(AttentionRow row, measure(c, data, kernel, is_first ? first : other));
      if (!is_first) row.difference = bench::largest_difference(first, other);
      done(row);
    }
  }
  return {};
}

}  // namespace compact::engine
