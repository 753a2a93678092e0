// Experiments that decide the shape of the sm_90a kernel (docs/design/sm90-kernel.md): the main kernel alone, in tile
// shapes that the library does not ship, and probes that leave parts of it out.
//
//   sm90_experiments E1|E2|E3|E4|E5|all [--seconds N]
//
//   E1  rate of the loads: loads without arithmetic, loads and MMAs without softmax; page sizes, layouts, L2 and HBM
//   E2  tile shapes, turns, overlap, Q in registers: dense and sparse lists
//   E3  physical pages in random order against in sequence
//   E4  M-tiles of a head dispatched together against shuffled; shared lists against one per tile
//   E5  rate over N seconds at full load (default 5); read it beside a clock log
//
// Lists are planned as in the library; prepare and combine run but are not timed. Every variant's output is compared
// with the library's (tested by attention_gpu_test): a difference far above bf16 rounding means a wrong variant.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "engine/bench/cuda/gpu_bench.h"
#include "benchmarks/sm90_variants.h"
#include "src/attention/cuda/plan.h"

namespace compact::bench {
namespace {

// ---- one figure ----------------------------------------------------------------------------------------------------

// Everything a variant needs to run on one case: outputs, and per input set a plan made once.
class Bench {
 public:
  Bench(const Case& c, const Inputs& data, const Variant& variant, bool shuffled_items = false)
      : case_(c), data_(data), variant_(variant), o_(data.rows * c.head_dim * 2), lse_(data.rows * 4) {
    const CudaAttentionOptions options{.backend = CudaBackend::kSm90};
    const CudaAttentionOutput output{.o = o_.data(),
                                     .o_token_stride = std::int64_t{c.q_heads} * c.head_dim,
                                     .o_head_stride = c.head_dim,
                                     .lse = static_cast<float*>(lse_.data())};
    for (int set = 0; set < kSets; ++set) {
      const CudaAttentionInput& input = data.inputs[static_cast<std::size_t>(set)];
      Result<CudaPlan> plan = plan_attention(input, options);
      check(plan.status());
      check(plan_tile(*plan, input, options, variant.tile.rows, variant.tile.tokens, plan->num_sms));
      memory_.emplace_back(plan->workspace.bytes);
      memory_.emplace_back(std::int64_t{sizeof(WorkHeader)});
      Set s{.plan = *plan, .fresh_header = memory_.back().data()};
      s.chain = make_chain(*plan, input, output, options, memory_[memory_.size() - 2].data());
      check(sm90_make_arguments(s.chain.main, variant.tile, s.arguments));
      check(launch_chain_prepare(*plan, s.chain, nullptr));
      CA_BENCH_CUDA(cudaMemcpy(s.fresh_header, s.chain.prepare.header, sizeof(WorkHeader), cudaMemcpyDeviceToDevice));
      look_at_items(s.chain.prepare, shuffled_items);
      sets_.push_back(s);
    }
  }

  // The main kernel draws items from a counter in the header: a fresh one for every run.
  void rewind(int i) {
    const Set& s = sets_[static_cast<std::size_t>(i % kSets)];
    CA_BENCH_CUDA(
        cudaMemcpyAsync(s.chain.prepare.header, s.fresh_header, sizeof(WorkHeader), cudaMemcpyDeviceToDevice));
  }
  void run(int i) { CA_BENCH_CUDA(variant_.run(sets_[static_cast<std::size_t>(i % kSets)].arguments, nullptr)); }

  Times time() {
    return time_runs([this](int i) { rewind(i); }, [this](int i) { run(i); });
  }

  // max |difference| to the library's result for set 0.
  double difference() {
    rewind(0);
    run(0);
    check(launch_chain_combine(sets_[0].plan, sets_[0].chain, nullptr));
    const std::vector<float> mine = first_values(o_.data(), data_.rows * case_.head_dim);
    const CudaAttentionOptions options{.backend = CudaBackend::kSm90};
    const Result<std::int64_t> bytes = attend_cuda_workspace_bytes(data_.inputs[0], options);
    check(bytes.status());
    const Memory workspace(*bytes);
    const CudaAttentionOutput output{.o = o_.data(),
                                     .o_token_stride = std::int64_t{case_.q_heads} * case_.head_dim,
                                     .o_head_stride = case_.head_dim,
                                     .lse = static_cast<float*>(lse_.data())};
    check(attend_cuda(data_.inputs[0], output, options, workspace.data(), *bytes, nullptr));
    return largest_difference(mine, first_values(o_.data(), data_.rows * case_.head_dim));
  }

  void print(const char* experiment) {
    const Times t = time();
    std::printf("%s %-26s %-34s %8.3f ms (min %8.3f) %6.1f TFLOP/s  L2 to SM %5.2f TB/s", experiment, variant_.name,
                case_.name.c_str(), t.median_ms, t.min_ms,
                variant_.computes ? data_.lists.flop / t.median_ms * 1e-9 : 0.0,
                2.0 * static_cast<double>(kv_tiles_) * variant_.tile.kv_bytes() / t.median_ms * 1e-9);
    if (variant_.computes) std::printf("  max |difference| %.4f", difference());
    std::printf("\n");
    std::fflush(stdout);
  }

  double tflops(double ms) const { return data_.lists.flop / ms * 1e-9; }

 private:
  struct Set {
    CudaPlan plan;
    CudaChain chain = {};
    Sm90Arguments arguments = {};
    void* fresh_header = nullptr;
  };

  // Counts the KV tiles of the plan; optionally gives the items a random order.
  void look_at_items(const PrepareArgs& prepare, bool shuffled) {
    WorkHeader header;
    CA_BENCH_CUDA(cudaMemcpy(&header, prepare.header, sizeof(header), cudaMemcpyDeviceToHost));
    std::vector<WorkItem> items(static_cast<std::size_t>(header.num_items));
    CA_BENCH_CUDA(cudaMemcpy(items.data(), prepare.items, items.size() * sizeof(WorkItem), cudaMemcpyDeviceToHost));
    kv_tiles_ = 0;
    for (const WorkItem& item : items) kv_tiles_ += tile_count(item);
    if (!shuffled) return;
    std::mt19937_64 random(1);
    std::shuffle(items.begin(), items.end(), random);
    CA_BENCH_CUDA(cudaMemcpy(prepare.items, items.data(), items.size() * sizeof(WorkItem), cudaMemcpyHostToDevice));
  }

  const Case& case_;
  const Inputs& data_;
  const Variant& variant_;
  Memory o_, lse_;
  std::vector<Memory> memory_;
  std::vector<Set> sets_;
  std::int64_t kv_tiles_ = 0;
};

// ---- the experiments -----------------------------------------------------------------------------------------------

Case b1(std::int32_t context, double density = 1.0) {
  return {.name = fmt::format("B1 L{} d{:.2f}", context, density), .contexts = {context}, .density = density};
}
Case b8(std::int32_t context, double density = 1.0) {
  return {.name = fmt::format("B8 L{} d{:.2f}", context, density),
          .contexts = std::vector<std::int32_t>(8, context),
          .q_heads = 16,
          .kv_heads = 4,
          .density = density};
}

void loads() {
  // K and V of L 4096 are 17 MB per set: the three sets stay in L2. Those of L 32768 do not.
  for (const std::int32_t context : {4096, 32768}) {
    for (const bool nhd : {false, true}) {
      for (const std::int32_t page_tokens : {16, 32, 64, 128, 256}) {
        Case c = b1(context);
        c.name += fmt::format(" P{} {}", page_tokens, nhd ? "NHD" : "HND");
        c.page_tokens = page_tokens;
        c.nhd = nhd;
        const Inputs data(c);
        for (const Variant& variant : sm90_probes()) {
          if (variant.tile.tokens == 128 || page_tokens == 128) Bench(c, data, variant).print("E1");
        }
      }
    }
  }
}

void tiles() {
  for (Case c : {b1(32768), b8(131072), b8(131072, 0.10)}) {
    for (const std::int32_t head_dim : {128, 64, 256}) {
      if (head_dim != 128 && c.contexts.size() > 1) continue;
      c.head_dim = head_dim;
      const Inputs data(c);
      for (const Variant& variant : sm90_tile_variants()) {
        if (variant.tile.head_dim == head_dim) Bench(c, data, variant).print("E2");
      }
    }
  }
}

void page_order() {
  for (Case c : {b1(32768), b8(131072), b8(131072, 0.10)}) {
    for (const bool permuted : {true, false}) {
      Case ordered = c;
      ordered.permuted_pages = permuted;
      ordered.name += permuted ? " random ids" : " ids in sequence";
      const Inputs data(ordered);
      const Variant variant = sm90_tile_variants().front();
      Bench(ordered, data, variant).print("E3");
    }
  }
}

void sharing() {
  for (Case c : {b1(131072), b8(131072), b1(131072, 0.10), b8(131072, 0.10)}) {
    for (const bool shared : {true, false}) {
      if (!shared && c.density == 1.0) continue;  // a list per tile of all pages differs in nothing
      Case listed = c;
      listed.shared = shared;
      listed.name += shared ? " shared" : " per tile";
      const Inputs data(listed);
      const Variant variant = sm90_tile_variants().front();
      Bench(listed, data, variant).print("E4");
      listed.name += " shuffled";
      Bench(listed, data, variant, true).print("E4");
    }
  }
}

void sustain(double seconds) {
  const Case c = b8(131072);
  const Inputs data(c);
  const Variant variant = sm90_tile_variants().front();
  Bench bench(c, data, variant);
  cudaEvent_t begin, end;
  CA_BENCH_CUDA(cudaEventCreate(&begin));
  CA_BENCH_CUDA(cudaEventCreate(&end));
  constexpr int kRuns = 16;  // about a quarter of a second
  for (double spent = 0; spent < seconds;) {
    CA_BENCH_CUDA(cudaEventRecord(begin));
    for (int i = 0; i < kRuns; ++i) bench.rewind(i), bench.run(i);
    CA_BENCH_CUDA(cudaEventRecord(end));
    CA_BENCH_CUDA(cudaEventSynchronize(end));
    float ms = 0;
    CA_BENCH_CUDA(cudaEventElapsedTime(&ms, begin, end));
    spent += ms * 1e-3;
    std::printf("E5 %s after %5.2f s: %6.1f TFLOP/s\n", c.name.c_str(), spent, bench.tflops(ms / kRuns));
    std::fflush(stdout);
  }
  CA_BENCH_CUDA(cudaEventDestroy(begin));
  CA_BENCH_CUDA(cudaEventDestroy(end));
}

int run(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  const bool has_seconds = argc == 4 && std::strcmp(argv[2], "--seconds") == 0;
  const double seconds = has_seconds ? std::atof(argv[3]) : 5.0;
  const bool known = what == "all" || (what.size() == 2 && what[0] == 'E' && what[1] >= '1' && what[1] <= '5');
  if (!known || (argc > 2 && !has_seconds) || seconds <= 0) {
    std::fprintf(stderr, "usage: sm90_experiments E1|E2|E3|E4|E5|all [--seconds N]\n");
    return 2;
  }
  const auto chosen = [&](const char* experiment) { return what == "all" || what == experiment; };
  if (chosen("E1")) loads();
  if (chosen("E2")) tiles();
  if (chosen("E3")) page_order();
  if (chosen("E4")) sharing();
  if (chosen("E5")) sustain(seconds);
  return 0;
}

}  // namespace
}  // namespace compact::bench

int main(int argc, char** argv) { return compact::bench::run(argc, argv); }
