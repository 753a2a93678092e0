// The sparse step on one GPU, part by part and whole: selection (mean-key), union and lists, attention on these lists;
// and dense attention by the same kernel.
//
//   step_gpu_bench [--mode paper|tile|adaptive] [--density 0.10] [--filter TEXT] [--json FILE]
//
// Keys are normal around one topic per page; every query row asks for three pages of a pool that its (request, KV head)
// shares, so that the density after the union comes out near the one asked for; the density measured is printed.
// Share 0.1, sinks and window as by default. Three input sets in turn, at least 20 runs, each
// between two CUDA events and queued while the stream is held: launch overhead hides no stage. "chain": select, unite,
// attend (4 kernels and combine) one after the other; "graph": the same as a replayed CUDA graph; "plan" is paid once
// per step for all layers and stands beside them.
#include <fmt/format.h>

#include <cstdio>
#include <string>
#include <vector>

#include "benchmarks/gpu_bench.h"
#include "compact/step_cuda.h"

namespace compact::bench {
namespace {

constexpr DType kDType = DType::kBF16;

// One input set: what the step reads and makes, in device memory.
struct StepSet {
  CudaStepInput step;
  CudaStepSizes sizes;
  CudaMeanKeyInput keys;
  CudaPageLists lists;
  std::uint64_t* mask = nullptr;
  std::int32_t* error = nullptr;
  void* workspace = nullptr;
  CudaAttentionInput attention;
};

struct StepData {
  Inputs dense;  // one list of all pages per (request, KV head)
  std::vector<Memory> memory;
  std::vector<StepSet> sets;
  double share = 0;

  StepData(const Case& c, UnionMode mode, double density) : dense(c) {
    for (int set = 0; set < kSets; ++set) sets.push_back(make_set(c, mode, density, set));
    CA_BENCH_CUDA(cudaDeviceSynchronize());
    for (const StepSet& set : sets) {
      std::int32_t error = 0;
      CA_BENCH_CUDA(cudaMemcpy(&error, set.error, 4, cudaMemcpyDeviceToHost));
      if (error == 0) continue;
      fmt::print(stderr, "plan: {}\n", cuda_step_error_text(static_cast<CudaStepError>(error)));
      std::exit(1);
    }
  }

 private:
  void* take(std::int64_t bytes) {
    memory.emplace_back(std::max<std::int64_t>(bytes, 16));
    return memory.back().data();
  }

  StepSet make_set(const Case& c, UnionMode mode, double density, int set) {
    const auto seed = static_cast<std::uint64_t>(3 * set + 1);  // as Inputs draws it
    const CudaAttentionInput& in = dense.inputs[static_cast<std::size_t>(set)];
    const auto requests = static_cast<std::int32_t>(c.contexts.size());
    const std::int32_t context = c.contexts.front(), pages = context / c.page_tokens;
    const Lists all = make_lists(c, seed);
    std::vector<std::int32_t> tables;
    std::vector<CudaChunk> chunks;
    for (std::int32_t b = 0; b < requests; ++b) {
      const auto first = all.page_ids.begin() + all.units[static_cast<std::size_t>(b * c.kv_heads)].list_begin;
      tables.insert(tables.end(), first, first + pages);
      chunks.push_back({b * c.chunk, c.chunk, context - c.chunk, b});
    }
    StepSet s;
    memory.emplace_back(tables);
    s.step.page_tables = static_cast<const std::int32_t*>(memory.back().data());
    memory.emplace_back(chunks);
    s.step.chunks = static_cast<const CudaChunk*>(memory.back().data());
    s.step.page_table_stride = pages;
    s.step.num_table_rows = s.step.num_chunks = requests;
    s.step.num_q_tokens = requests * c.chunk;
    s.step.max_context_tokens = context;
    s.step.num_q_heads = c.q_heads;
    s.step.num_kv_heads = c.kv_heads;
    s.step.page_tokens = c.page_tokens;
    s.step.num_pages = in.kv.num_pages;
    s.step.options.mode = mode;
    const Result<CudaStepSizes> sizes = step_cuda_sizes(s.step);
    check(sizes.status());
    s.sizes = *sizes;
    s.lists.units = static_cast<AttentionUnit*>(take(std::int64_t{s.sizes.max_units} * 32));
    s.lists.num_units = static_cast<std::int32_t*>(take(4));
    s.lists.page_ids = static_cast<std::int32_t*>(take(s.sizes.num_list_entries * 4));
    s.lists.stats = static_cast<UnionStats*>(take(std::int64_t{s.sizes.num_stats} * 24));
    s.mask = static_cast<std::uint64_t*>(take(s.sizes.mask_words * 8));
    s.workspace = take(s.sizes.workspace_bytes);
    s.error = static_cast<std::int32_t*>(take(4));
    CA_BENCH_CUDA(cudaMemset(s.error, 0, 4));

    // Forced pages are in the density asked for: sinks and, over the chunk's blocks, the window before it.
    const std::int32_t past_pages = (context - c.chunk) / c.page_tokens;
    const std::int32_t forced = 256 / c.page_tokens + 512 / c.page_tokens - 1;
    const std::uint64_t key_seed = seed << 40;
    CA_BENCH_CUDA(
        fill_topic_keys(const_cast<void*>(in.kv.k), in.kv.num_pages, c.kv_heads, c.page_tokens, c.head_dim, key_seed));
    TopicQueries queries;
    queries.q = const_cast<void*>(in.q);
    queries.page_tables = s.step.page_tables;
    queries.requests = requests;
    queries.chunk_tokens = c.chunk;
    queries.q_heads = c.q_heads;
    queries.kv_heads = c.kv_heads;
    queries.head_dim = c.head_dim;
    queries.pages_per_table = pages;
    queries.past_pages = past_pages;
    queries.pool_pages = std::max(1, static_cast<std::int32_t>(std::lround(density * past_pages)) - forced);
    CA_BENCH_CUDA(fill_topic_queries(queries, key_seed));

    void* means = take(std::int64_t{in.kv.num_pages} * c.kv_heads * c.head_dim * 2);
    auto* mean_tokens = static_cast<std::int32_t*>(take(std::int64_t{in.kv.num_pages} * 4));
    check(page_means_cuda(s.step, in.kv, means, mean_tokens, nullptr));
    s.step.mean_tokens = mean_tokens;
    s.keys.q = in.q;
    s.keys.q_token_stride = in.q_token_stride;
    s.keys.q_head_stride = in.q_head_stride;
    s.keys.mean_k = means;
    s.keys.dtype = kDType;
    s.keys.head_dim = c.head_dim;
    s.keys.softmax_scale = in.softmax_scale;
    share = double{s.keys.options.share};
    s.attention = in;
    s.attention.units = s.lists.units;
    s.attention.num_units = s.lists.num_units;
    s.attention.page_ids = s.lists.page_ids;
    s.attention.max_units = s.sizes.max_units;
    s.attention.heads_per_unit = s.sizes.heads_per_unit;
    check(plan_step_cuda(s.step, s.error, s.workspace, s.sizes.workspace_bytes, nullptr));
    return s;
  }
};

struct Row {
  std::string name;
  std::string mode;
  double share = 0, density = 0, inflation = 0;
  std::int64_t units = 0;
  Times plan = {}, select = {}, unite = {}, attend = {}, chain = {}, graph = {}, dense = {};
};

Row measure(const Case& c, UnionMode mode, double density) {
  const StepData data(c, mode, density);
  const auto set_of = [&](int i) -> const StepSet& { return data.sets[static_cast<std::size_t>(i % kSets)]; };
  const CudaAttentionOptions options;
  const Result<std::int64_t> sparse_bytes = attend_cuda_workspace_bytes(data.sets[0].attention, options);
  const Result<std::int64_t> dense_bytes = attend_cuda_workspace_bytes(data.dense.inputs[0], options);
  check(sparse_bytes.status());
  check(dense_bytes.status());
  const std::int64_t bytes = std::max(*sparse_bytes, *dense_bytes);
  const Memory workspace(bytes), o(data.dense.rows * c.head_dim * 2), lse(data.dense.rows * 4);
  const CudaAttentionOutput output{.o = o.data(),
                                   .o_token_stride = std::int64_t{c.q_heads} * c.head_dim,
                                   .o_head_stride = c.head_dim,
                                   .lse = static_cast<float*>(lse.data())};
  const auto plan = [&](int i, cudaStream_t stream) {
    const StepSet& s = set_of(i);
    check(plan_step_cuda(s.step, s.error, s.workspace, s.sizes.workspace_bytes, stream));
  };
  const auto select = [&](int i, cudaStream_t stream) {
    const StepSet& s = set_of(i);
    check(select_mean_key_cuda(s.step, s.keys, s.mask, nullptr, s.workspace, s.sizes.workspace_bytes, stream));
  };
  const auto unite = [&](int i, cudaStream_t stream) {
    const StepSet& s = set_of(i);
    check(build_page_lists_cuda(s.step, s.mask, s.lists, s.workspace, s.sizes.workspace_bytes, stream));
  };
  const auto attend = [&](int i, cudaStream_t stream) {
    check(attend_cuda(set_of(i).attention, output, options, workspace.data(), bytes, stream));
  };
  const auto chain = [&](int i, cudaStream_t stream) { select(i, stream), unite(i, stream), attend(i, stream); };

  Row row{.name = c.name, .mode = union_mode_name(mode), .share = data.share};
  row.plan = time_runs([&](int i) { plan(i, nullptr); });
  row.select = time_runs([&](int i) { select(i, nullptr); });
  row.unite = time_runs([&](int i) { unite(i, nullptr); });
  row.attend = time_runs([&](int i) { attend(i, nullptr); });
  row.chain = time_runs([&](int i) { chain(i, nullptr); });
  row.dense = time_runs([&](int i) {
    check(attend_cuda(data.dense.inputs[static_cast<std::size_t>(i % kSets)], output, options, workspace.data(), bytes,
                      nullptr));
  });

  std::vector<cudaGraphExec_t> graphs;
  cudaStream_t stream;
  CA_BENCH_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (int i = 0; i < kSets; ++i) {
    cudaGraph_t graph;
    CA_BENCH_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    chain(i, stream);
    CA_BENCH_CUDA(cudaStreamEndCapture(stream, &graph));
    graphs.emplace_back();
    CA_BENCH_CUDA(cudaGraphInstantiate(&graphs.back(), graph, 0));
    CA_BENCH_CUDA(cudaGraphDestroy(graph));
  }
  row.graph =
      time_runs([&](int i) { CA_BENCH_CUDA(cudaGraphLaunch(graphs[static_cast<std::size_t>(i % kSets)], nullptr)); });
  for (const cudaGraphExec_t graph : graphs) CA_BENCH_CUDA(cudaGraphExecDestroy(graph));
  CA_BENCH_CUDA(cudaStreamDestroy(stream));

  const StepSet& first = data.sets[0];
  std::vector<UnionStats> stats(static_cast<std::size_t>(first.sizes.num_stats));
  CA_BENCH_CUDA(cudaMemcpy(stats.data(), first.lists.stats, stats.size() * sizeof(UnionStats), cudaMemcpyDeviceToHost));
  UnionStats sum;
  for (const UnionStats& one : stats) sum.add(one);
  row.density = sum.density();
  row.inflation = sum.union_inflation();
  std::vector<AttentionUnit> units(static_cast<std::size_t>(first.sizes.max_units));
  std::int32_t places = 0;
  CA_BENCH_CUDA(cudaMemcpy(&places, first.lists.num_units, 4, cudaMemcpyDeviceToHost));
  CA_BENCH_CUDA(cudaMemcpy(units.data(), first.lists.units, units.size() * 32, cudaMemcpyDeviceToHost));
  for (std::int32_t u = 0; u < places; ++u) row.units += units[static_cast<std::size_t>(u)].q_len > 0 ? 1 : 0;
  return row;
}

void write_json(const char* path, const std::vector<Row>& rows) {
  std::FILE* file = std::fopen(path, "w");
  if (file == nullptr) {
    fmt::print(stderr, "step_gpu_bench: cannot write {}\n", path);
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
        "  {{\"name\": \"{}\", \"mode\": \"{}\", \"share\": {}, \"density\": {:.4f}, \"union_inflation\": {:.3f}, "
        "\"units\": {}, \"plan_ms\": {:.5f}, \"select_ms\": {:.5f}, \"unite_ms\": {:.5f}, \"attend_ms\": {:.5f}, "
        "\"chain_ms\": {:.5f}, \"chain_ms_min\": {:.5f}, \"graph_ms\": {:.5f}, \"graph_ms_min\": {:.5f}, "
        "\"dense_ms\": {:.5f}}}{}\n",
        r.name, r.mode, r.share, r.density, r.inflation, r.units, r.plan.median_ms, r.select.median_ms,
        r.unite.median_ms, r.attend.median_ms, r.chain.median_ms, r.chain.min_ms, r.graph.median_ms, r.graph.min_ms,
        r.dense.median_ms, i + 1 < rows.size() ? "," : "");
  }
  fmt::print(file, "]}}\n");
  std::fclose(file);
}

std::vector<Case> fixed_set() {
  std::vector<Case> cases;
  for (const std::int32_t l : {32768, 131072}) {
    cases.push_back({.name = fmt::format("B8 Hq16 Hkv4 C1024 L{}", l),
                     .contexts = std::vector<std::int32_t>(8, l),
                     .q_heads = 16,
                     .kv_heads = 4});
  }
  for (const std::int32_t l : {65536, 131072}) {
    cases.push_back({.name = fmt::format("B1 Hq32 Hkv8 C1024 L{}", l), .contexts = {l}});
  }
  return cases;
}

int run(int argc, char** argv) {
  std::string mode = "all", filter, json;
  double density = 0.10;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const auto value = [&] {
      if (i + 1 >= argc) {
        fmt::print(stderr, "step_gpu_bench: {} needs a value\n", flag);
        std::exit(2);
      }
      return std::string(argv[++i]);
    };
    if (flag == "--mode")
      mode = value();
    else if (flag == "--density")
      density = std::atof(value().c_str());
    else if (flag == "--filter")
      filter = value();
    else if (flag == "--json")
      json = value();
    else {
      fmt::print(stderr, "step_gpu_bench: unknown option '{}'; allowed: --mode --density --filter --json\n", flag);
      return 2;
    }
  }
  if (!(density > 0 && density <= 1)) {
    fmt::print(stderr, "step_gpu_bench: --density is {}; allowed: above 0, at most 1\n", density);
    return 2;
  }
  std::vector<UnionMode> modes;
  for (const UnionMode one : {UnionMode::kPaper, UnionMode::kTile, UnionMode::kAdaptive}) {
    if (mode == "all" || mode == union_mode_name(one)) modes.push_back(one);
  }
  if (modes.empty()) {
    fmt::print(stderr, "step_gpu_bench: --mode is '{}'; allowed: all, paper, tile, adaptive\n", mode);
    return 2;
  }
  std::vector<Row> rows;
  bool warm = false;
  for (const Case& c : fixed_set()) {
    if (c.name.find(filter) == std::string::npos) continue;
    for (const UnionMode one : modes) {
      if (!warm) (void)measure(c, one, density);  // clocks, code upload
      warm = true;
      const Row r = measure(c, one, density);
      fmt::print(
          "{:28} {:8} density {:.3f} inflation {:.2f} units {:5} | plan {:.4f} select {:.4f} unite {:.4f} attend "
          "{:.4f} "
          "chain {:.4f} graph {:.4f} dense {:.4f} ms | {:.2f}x\n",
          r.name, r.mode, r.density, r.inflation, r.units, r.plan.median_ms, r.select.median_ms, r.unite.median_ms,
          r.attend.median_ms, r.chain.median_ms, r.graph.median_ms, r.dense.median_ms,
          r.dense.median_ms / r.graph.median_ms);
      std::fflush(stdout);
      rows.push_back(r);
    }
  }
  if (!json.empty()) write_json(json.c_str(), rows);
  return 0;
}

}  // namespace
}  // namespace compact::bench

int main(int argc, char** argv) { return compact::bench::run(argc, argv); }
