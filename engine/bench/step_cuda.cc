#include "engine/bench/step_cuda.h"

#include <fmt/format.h>

#include <optional>

#include "compact/run_step_cuda.h"
#include "engine/bench/cuda/gpu_bench.h"

namespace compact::engine {
namespace {

using bench::Case;
using bench::check;
using bench::Inputs;
using bench::kSets;
using bench::Lists;
using bench::Memory;
using bench::time_runs;
using bench::TopicQueries;

// One input set: what the step reads and makes, in device memory.
struct StepSet {
  CudaStepInput step;
  CudaStepSizes sizes;
  CudaStepLayer layer;
  CudaPageLists lists;
  std::uint64_t* mask = nullptr;
  std::int32_t* error = nullptr;
  void* workspace = nullptr;
  std::int64_t workspace_bytes = 0;
  CudaAttentionInput attention;
};

// Memory of all sets, for every mode: bounds are those of the mode that needs most.
class StepBench {
 public:
  StepBench(const Case& c, double density) : case_(c), inputs_(c), o_(inputs_.rows * c.head_dim * 2) {
    for (int set = 0; set < kSets; ++set) sets_.push_back(make_set(density, set));
    CA_BENCH_CUDA(cudaDeviceSynchronize());
  }

  // With `options`; crossover: the default policy. dense: all pages, without selection.
  Result<StepTimes> measure(const UnionOptions& options, bool crosses_over, bool dense, bool with_attention) {
    std::vector<Memory> memory;
    for (StepSet& set : sets_) {
      set.step.options = options;
      set.step.crosses_over = crosses_over;
      set.layer.dense = dense;
      CA_RETURN_IF_ERROR(allocate(set, memory));
      check(plan_step_cuda(set.step, set.error, set.workspace, set.workspace_bytes, nullptr));
    }
    const auto set_of = [&](int i) -> const StepSet& { return sets_[static_cast<std::size_t>(i % kSets)]; };
    const auto seconds = [](const bench::Times& times) { return 1e-3 * times.median_ms; };
    StepTimes times;
    times.plan = seconds(time_runs([&](int i) {
      const StepSet& s = set_of(i);
      check(plan_step_cuda(s.step, s.error, s.workspace, s.workspace_bytes, nullptr));
    }));
    if (!dense) {
      times.select = seconds(time_runs([&](int i) {
        const StepSet& s = set_of(i);
        check(
            select_cuda(s.step, s.layer.select, s.mask, nullptr, s.workspace, s.workspace_bytes, nullptr, 0, nullptr));
      }));
    }
    times.unite = seconds(time_runs([&](int i) {
      const StepSet& s = set_of(i);
      check(dense ? build_dense_lists_cuda(s.step, s.lists, s.workspace, s.workspace_bytes, nullptr)
                  : build_page_lists_cuda(s.step, s.mask, s.lists, s.workspace, s.workspace_bytes, nullptr));
    }));
    if (with_attention) {
      const Result<std::int64_t> bytes = attend_cuda_workspace_bytes(sets_[0].attention, {});
      CA_RETURN_IF_ERROR(bytes.status());
      const Memory attention_workspace(*bytes);
      times.attend = seconds(time_runs([&](int i) {
        check(
            attend_cuda(set_of(i).attention, set_of(i).layer.output, {}, attention_workspace.data(), *bytes, nullptr));
      }));
      times.whole = whole_seconds();
    }
    read_decisions(times);
    return times;
  }

 private:
  StepSet make_set(double density, int set) {
    const Case& c = case_;
    const auto seed = static_cast<std::uint64_t>(3 * set + 1);  // as Inputs draws it
    const CudaAttentionInput& in = inputs_.inputs[static_cast<std::size_t>(set)];
    const auto requests = static_cast<std::int32_t>(c.contexts.size());
    const std::int32_t context = c.contexts.front(), pages = context / c.page_tokens;
    const Lists all = bench::make_lists(c, seed);
    std::vector<std::int32_t> tables;
    std::vector<CudaChunk> chunks;
    for (std::int32_t b = 0; b < requests; ++b) {
      const auto first = all.page_ids.begin() + all.units[static_cast<std::size_t>(b * c.kv_heads)].list_begin;
      tables.insert(tables.end(), first, first + pages);
      chunks.push_back({b * c.chunk, c.chunk, context - c.chunk, b});
    }
    StepSet s;
    memory_.emplace_back(tables);
    s.step.page_tables = static_cast<const std::int32_t*>(memory_.back().data());
    memory_.emplace_back(chunks);
    s.step.chunks = static_cast<const CudaChunk*>(memory_.back().data());
    s.step.page_table_stride = pages;
    s.step.num_table_rows = s.step.num_chunks = requests;
    s.step.num_q_tokens = requests * c.chunk;
    s.step.max_context_tokens = context;
    s.step.num_q_heads = c.q_heads;
    s.step.num_kv_heads = c.kv_heads;
    s.step.page_tokens = c.page_tokens;
    s.step.num_pages = in.kv.num_pages;
    s.error = static_cast<std::int32_t*>(take(memory_, 4));
    CA_BENCH_CUDA(cudaMemset(s.error, 0, 4));

    // Forced pages are in the density asked for: sinks and, over the chunk's blocks, the window before it.
    const std::int32_t past_pages = (context - c.chunk) / c.page_tokens;
    const std::int32_t forced = 256 / c.page_tokens + 512 / c.page_tokens - 1;
    const std::uint64_t key_seed = seed << 40;
    CA_BENCH_CUDA(bench::fill_topic_keys(const_cast<void*>(in.kv.k), in.kv.num_pages, c.kv_heads, c.page_tokens,
                                         c.head_dim, key_seed));
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
    CA_BENCH_CUDA(bench::fill_topic_queries(queries, key_seed));

    void* means = take(memory_, std::int64_t{in.kv.num_pages} * c.kv_heads * c.head_dim * 2);
    auto* mean_tokens = static_cast<std::int32_t*>(take(memory_, std::int64_t{in.kv.num_pages} * 4));
    check(page_means_cuda(s.step, in.kv, means, mean_tokens, nullptr));
    s.step.mean_tokens = mean_tokens;
    CudaSelectInput& keys = s.layer.select;
    keys.q = in.q;
    keys.q_token_stride = in.q_token_stride;
    keys.q_head_stride = in.q_head_stride;
    keys.summaries.mean_k = means;
    keys.dtype = in.kv.dtype;
    keys.head_dim = c.head_dim;
    keys.softmax_scale = in.softmax_scale;
    s.layer.kv = in.kv;
    s.layer.output = {.o = o_.data(),
                      .o_token_stride = std::int64_t{c.q_heads} * c.head_dim,
                      .o_head_stride = c.head_dim,
                      .lse = nullptr,
                      .error = nullptr};
    s.attention = in;
    return s;
  }

  // What depends on the options.
  static Status allocate(StepSet& s, std::vector<Memory>& memory) {
    CA_ASSIGN_OR_RETURN(s.sizes, step_cuda_sizes(s.step));
    CA_ASSIGN_OR_RETURN(s.workspace_bytes, run_step_cuda_bytes(s.step, s.layer));
    s.workspace = take(memory, s.workspace_bytes);
    s.mask = static_cast<std::uint64_t*>(take(memory, s.sizes.mask_words * 8));
    s.lists.units = static_cast<AttentionUnit*>(take(memory, std::int64_t{s.sizes.max_units} * 32));
    s.lists.num_units = static_cast<std::int32_t*>(take(memory, 4));
    s.lists.page_ids = static_cast<std::int32_t*>(take(memory, s.sizes.num_list_entries * 4));
    s.lists.stats = static_cast<UnionStats*>(take(memory, std::int64_t{s.sizes.num_stats} * 24));
    s.lists.reasons = static_cast<DenseReason*>(take(memory, std::int64_t{s.sizes.num_stats} * 4));
    s.attention.units = s.lists.units;
    s.attention.num_units = s.lists.num_units;
    s.attention.page_ids = s.lists.page_ids;
    s.attention.max_units = s.sizes.max_units;
    s.attention.heads_per_unit = s.sizes.heads_per_unit;
    return {};
  }

  static void* take(std::vector<Memory>& memory, std::int64_t bytes) {
    memory.emplace_back(std::max<std::int64_t>(bytes, 16));
    return memory.back().data();
  }

  // run_step_cuda as a graph for each set.
  double whole_seconds() {
    std::vector<cudaGraphExec_t> graphs;
    cudaStream_t stream;
    CA_BENCH_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (const StepSet& set : sets_) {
      cudaGraph_t graph;
      CA_BENCH_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
      check(run_step_cuda(set.step, set.layer, set.workspace, set.workspace_bytes, stream));
      CA_BENCH_CUDA(cudaStreamEndCapture(stream, &graph));
      graphs.emplace_back();
      CA_BENCH_CUDA(cudaGraphInstantiate(&graphs.back(), graph, 0));
      CA_BENCH_CUDA(cudaGraphDestroy(graph));
    }
    const bench::Times times =
        time_runs([&](int i) { CA_BENCH_CUDA(cudaGraphLaunch(graphs[static_cast<std::size_t>(i % kSets)], nullptr)); });
    for (const cudaGraphExec_t graph : graphs) CA_BENCH_CUDA(cudaGraphExecDestroy(graph));
    CA_BENCH_CUDA(cudaStreamDestroy(stream));
    return 1e-3 * times.median_ms;
  }

  // Sums and the commonest reason of the first set; a mistake of the plan ends the program.
  void read_decisions(StepTimes& times) const {
    const StepSet& first = sets_.front();
    for (const StepSet& set : sets_) {
      std::int32_t error = 0;
      CA_BENCH_CUDA(cudaMemcpy(&error, set.error, 4, cudaMemcpyDeviceToHost));
      if (error != 0) check(Status(StatusCode::kInternal, cuda_step_error_text(static_cast<CudaStepError>(error))));
    }
    std::vector<UnionStats> stats(static_cast<std::size_t>(first.sizes.num_stats));
    std::vector<DenseReason> reasons(stats.size());
    CA_BENCH_CUDA(
        cudaMemcpy(stats.data(), first.lists.stats, stats.size() * sizeof(UnionStats), cudaMemcpyDeviceToHost));
    CA_BENCH_CUDA(
        cudaMemcpy(reasons.data(), first.lists.reasons, reasons.size() * sizeof(DenseReason), cudaMemcpyDeviceToHost));
    std::int64_t counts[kNumDenseReasons] = {};
    for (const UnionStats& one : stats) times.stats.add(one);
    for (const DenseReason one : reasons) ++counts[static_cast<std::size_t>(one)];
    times.reason = static_cast<DenseReason>(std::max_element(std::begin(counts), std::end(counts)) - counts);
  }

  Case case_;
  Inputs inputs_;
  Memory o_;
  std::vector<Memory> memory_;
  std::vector<StepSet> sets_;
};

}  // namespace

Result<CudaBenchDevice> cuda_bench_device() {
  CA_ASSIGN_OR_RETURN(const CudaDevice device, current_cuda_device());
  int index = 0;
  cudaDeviceProp properties;
  CA_BENCH_CUDA(cudaGetDevice(&index));
  CA_BENCH_CUDA(cudaGetDeviceProperties(&properties, index));
  return CudaBenchDevice{properties.name, device.backend == CudaBackend::kSm90 ? "sm90" : "sm80"};
}

Result<std::vector<StepRow>> bench_step_cuda(const StepShape& shape, std::int32_t requests, std::int32_t context,
                                             double density, bool with_attention) {
  if (shape.chunk < 1 || context <= shape.chunk || context % shape.page_tokens != 0) {
    return invalid_argument(fmt::format("context {} with a chunk of {} and pages of {} tokens; a past, and whole pages",
                                        context, shape.chunk, shape.page_tokens));
  }
  if (shape.num_kv_heads < 1 || shape.num_q_heads < 1 || shape.num_q_heads % shape.num_kv_heads != 0) {
    return invalid_argument(
        fmt::format("{} query heads; a multiple of {} KV heads", shape.num_q_heads, shape.num_kv_heads));
  }
  if (requests < 1) return invalid_argument(fmt::format("{} requests; at least 1", requests));
  const Case c{.name = "",
               .contexts = std::vector<std::int32_t>(static_cast<std::size_t>(requests), context),
               .q_heads = shape.num_q_heads,
               .kv_heads = shape.num_kv_heads,
               .chunk = shape.chunk,
               .page_tokens = shape.page_tokens,
               .head_dim = shape.head_dim};
  StepBench bench(c, density);
  const float share = MeanKeyOptions().share;
  std::vector<StepRow> rows;
  if (with_attention) {
    const UnionOptions paper;
    CA_RETURN_IF_ERROR(bench.measure(paper, false, true, true).status());  // clocks, code upload
    CA_ASSIGN_OR_RETURN(const StepTimes dense, bench.measure(paper, false, true, true));
    rows.push_back({"dense", 0, dense});
  }
  for (const UnionMode mode : {UnionMode::kPaper, UnionMode::kTile, UnionMode::kAdaptive}) {
    CA_ASSIGN_OR_RETURN(const StepTimes times, bench.measure({.mode = mode}, false, false, with_attention));
    rows.push_back({union_mode_name(mode), share, times});
  }
  if (with_attention) {
    CA_ASSIGN_OR_RETURN(const StepTimes times, bench.measure({.mode = UnionMode::kAdaptive}, true, false, true));
    rows.push_back({kStepDefaultPolicy, share, times});
  }
  return rows;
}

}  // namespace compact::engine
