// One layer's step on the CPU, select + unite + attend, beside dense attention of the same backend.
//
//   step_cpu_bench [--threads N] [--contexts L,L,...] [--density X] [--json FILE] [--cpu-time] ...
//
// Per context: dense, then every union mode at the share threshold at which mode adaptive reads the wanted density
// (found by bisection), then the default policy: adaptive with the default threshold, sinks and window, the crossover
// after the union included. From where on that gains is what CrossoverPolicy::min_context_tokens should be. K and Q are
// made up with structure: pages belong to topics, runs of queries ask for a few topics; without it every page would be
// as good as any other. Times are medians; every stage is timed as the engine calls it.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "benchmarks/bench.h"
#include "compact/attention.h"
#include "compact/paged_kv.h"

namespace {

using namespace compact;

struct Shape {
  std::int32_t num_q_heads = 8;    // Hq
  std::int32_t num_kv_heads = 2;   // Hkv
  std::int32_t head_dim = 128;     // D
  std::int32_t chunk = 1024;       // C
  std::int32_t page_tokens = 128;  // P
  DType dtype = DType::kF32;
};

struct StepTimes {
  double select = 0;  // seconds
  double unite = 0;
  double attend = 0;
  UnionStats stats;
  DenseReason reason = DenseReason::kNone;
  [[nodiscard]] double total() const { return select + unite + attend; }
};

template <class T>
T value_or_exit(Result<T> result) {
  if (result.ok()) return std::move(result).value();
  fmt::print(stderr, "step_cpu_bench: {}\n", result.status().message());
  std::exit(1);
}
void ok_or_exit(const Status& status) {
  if (status.ok()) return;
  fmt::print(stderr, "step_cpu_bench: {}\n", status.message());
  std::exit(1);
}

// A request of L tokens in a cache of one layer, and the queries of its last chunk.
class Step {
 public:
  Step(const Shape& shape, std::int32_t context, ThreadPool& pool)
      : shape_(shape),
        pool_(pool),
        cache_(value_or_exit(PagedKvCache::create({.num_layers = 1,
                                                   .num_kv_heads = shape.num_kv_heads,
                                                   .head_dim = shape.head_dim,
                                                   .page_tokens = shape.page_tokens,
                                                   .num_pages = (context + shape.page_tokens - 1) / shape.page_tokens,
                                                   .dtype = shape.dtype}))) {
    topics_ = bench::random_floats(static_cast<std::size_t>(kTopics * shape.num_kv_heads * shape.head_dim), 1);
    const RequestId request = cache_.add_request();
    for (std::int32_t start = 0; start < context; start += kAppendTokens) append(request, start, context);
    table_ = value_or_exit(cache_.page_table(request));
    chunk_ = {.chunk_tokens = shape.chunk, .chunk_start = context - shape.chunk, .page_table = table_.data()};
    make_queries();
    o_.resize(q_.size());
  }

  // Every page, without a selection.
  StepTimes dense() {
    StepTimes times;
    times.unite = bench::seconds([&] { ok_or_exit(build_dense_lists(union_input({}, {}), lists_)); });
    times.attend = attend();
    times.stats = lists_.chunk_stats[0];
    return times;
  }

  StepTimes sparse(float share, const ForcedPages& forced, const UnionOptions& options, bool crossover) {
    SelectorOptions selector_options;
    selector_options.mean_key.share = share;
    const auto selector = value_or_exit(make_selector(selector_options));
    const auto rows = contiguous_rows<const float>(q_.data(), shape_.chunk, shape_.num_q_heads, shape_.head_dim);
    StepTimes times;
    times.select = bench::seconds([&] {
      ok_or_exit(selector->select({.chunks = {&chunk_, 1},
                                   .q = rows,
                                   .summaries = cache_.summaries(0),
                                   .page_tokens = shape_.page_tokens,
                                   .softmax_scale = scale()},
                                  mask_, pool_));
    });
    times.unite = bench::seconds([&] {
      const UnionInput input = union_input(forced, options);
      ok_or_exit(build_page_lists(input, mask_, lists_, pool_));
      if (crossover) ok_or_exit(crossover_after_union({}, input, lists_, {&times.reason, 1}));
    });
    times.attend = attend();
    times.stats = lists_.chunk_stats[0];
    return times;
  }

 private:
  static constexpr std::int32_t kTopics = 64;
  static constexpr std::int32_t kAppendTokens = 4096;
  static constexpr float kTopicOfKey = 1.0F;    // size of the topic in K, beside noise of 1
  static constexpr float kTopicOfQuery = 1.5F;  // and in Q

  [[nodiscard]] float scale() const { return 1.0F / std::sqrt(static_cast<float>(shape_.head_dim)); }
  [[nodiscard]] const float* topic(std::uint32_t index, std::int32_t kv_head) const {
    const auto at = static_cast<std::int64_t>(index % kTopics) * shape_.num_kv_heads + kv_head;
    return topics_.data() + at * shape_.head_dim;
  }

  void append(RequestId request, std::int32_t start, std::int32_t context) {
    const std::int32_t tokens = std::min(kAppendTokens, context - start);
    const auto row = static_cast<std::size_t>(shape_.num_kv_heads * shape_.head_dim);
    const auto seed = static_cast<std::uint32_t>(start + 7);
    std::vector<float> k = bench::random_floats(static_cast<std::size_t>(tokens) * row, seed);
    const std::vector<float> v = bench::random_floats(k.size(), seed + 1);
    for (std::int32_t t = 0; t < tokens; ++t) {
      const auto page = static_cast<std::uint32_t>((start + t) / shape_.page_tokens);
      for (std::int32_t g = 0; g < shape_.num_kv_heads; ++g) {
        const float* center = topic(page * 2654435761U >> 8, g);
        float* key = k.data() + static_cast<std::size_t>(t) * row + static_cast<std::size_t>(g * shape_.head_dim);
        for (std::int32_t d = 0; d < shape_.head_dim; ++d) key[d] += kTopicOfKey * center[d];
      }
    }
    const auto rows_of = [&](const std::vector<float>& data) {
      return contiguous_rows<const float>(data.data(), tokens, shape_.num_kv_heads, shape_.head_dim);
    };
    ok_or_exit(cache_.extend(request, tokens));
    ok_or_exit(cache_.write(request, 0, start, rows_of(k), rows_of(v), pool_));
  }

  // Runs of 320 queries ask for one topic, pairs of heads for another: the union over a chunk of 1024 then reads about
  // three times what its tiles want, as published for mean keys at 128K.
  void make_queries() {
    const std::int32_t group = shape_.num_q_heads / shape_.num_kv_heads;
    q_ = bench::random_floats(static_cast<std::size_t>(shape_.chunk * shape_.num_q_heads * shape_.head_dim), 3);
    for (std::int32_t t = 0; t < shape_.chunk; ++t) {
      for (std::int32_t h = 0; h < shape_.num_q_heads; ++h) {
        const float* center = topic(static_cast<std::uint32_t>(t / 320 + 5 * (h / 2)) * 2246822519U >> 8, h / group);
        float* q = q_.data() +
                   static_cast<std::size_t>(t * shape_.num_q_heads + h) * static_cast<std::size_t>(shape_.head_dim);
        for (std::int32_t d = 0; d < shape_.head_dim; ++d) q[d] += kTopicOfQuery * center[d];
      }
    }
  }

  [[nodiscard]] UnionInput union_input(const ForcedPages& forced, const UnionOptions& options) const {
    return {.chunks = {&chunk_, 1},
            .num_q_heads = shape_.num_q_heads,
            .num_kv_heads = shape_.num_kv_heads,
            .page_tokens = shape_.page_tokens,
            .num_physical_pages = cache_.options().num_pages,
            .forced = forced,
            .options = options};
  }

  double attend() {
    AttentionInput input;
    input.q = contiguous_rows<const float>(q_.data(), shape_.chunk, shape_.num_q_heads, shape_.head_dim);
    input.kv = cache_.layer(0);
    input.units = lists_.units;
    input.page_ids = lists_.page_ids;
    input.heads_per_unit = lists_.heads_per_unit;
    input.softmax_scale = scale();
    const AttentionOutput output{.o = contiguous_rows(o_.data(), shape_.chunk, shape_.num_q_heads, shape_.head_dim)};
    return bench::seconds([&] { ok_or_exit(attend_cpu(input, output, pool_)); });
  }

  Shape shape_;
  ThreadPool& pool_;
  PagedKvCache cache_;
  std::vector<float> topics_;  // [kTopics, Hkv, D]
  std::span<const std::int32_t> table_;
  ChunkView chunk_;
  std::vector<float> q_, o_;  // [C, Hq, D]
  BlockMask mask_;
  PageLists lists_;
};

// The share at which the step reads this density, within 2 %, or as near as the pages allow.
float share_for_density(Step& step, double density, const UnionOptions& options) {
  float low = 1e-6F;
  float high = 1.0F;
  for (int i = 0; i < 24; ++i) {
    const float middle = std::sqrt(low * high);
    const double seen = step.sparse(middle, {}, options, false).stats.density();
    if (std::abs(seen / density - 1) < 0.02) return middle;
    (seen > density ? low : high) = middle;
  }
  return high;
}

StepTimes median_times(std::int32_t repeats, const std::function<StepTimes()>& run) {
  std::vector<double> select, unite, attend;
  StepTimes times;
  for (std::int32_t i = 0; i < repeats; ++i) {
    times = run();
    select.push_back(times.select);
    unite.push_back(times.unite);
    attend.push_back(times.attend);
  }
  times.select = bench::median(select);
  times.unite = bench::median(unite);
  times.attend = bench::median(attend);
  return times;
}

nlohmann::json report(const char* name, const StepTimes& times, double dense_seconds) {
  fmt::print(
      "  {:<18} select {:7.2f} ms  unite {:6.3f} ms  attend {:8.2f} ms  {:5.2f}x   density {:.3f}  inflation {:.2f}  "
      "{}\n",
      name, 1e3 * times.select, 1e3 * times.unite, 1e3 * times.attend, dense_seconds / times.total(),
      times.stats.density(), times.stats.union_inflation(),
      times.reason == DenseReason::kNone ? "" : dense_reason_name(times.reason));
  return {{"name", name},
          {"select_seconds", times.select},
          {"unite_seconds", times.unite},
          {"attend_seconds", times.attend},
          {"speedup", dense_seconds / times.total()},
          {"density", times.stats.density()},
          {"union_inflation", times.stats.union_inflation()},
          {"dense_reason", dense_reason_name(times.reason)}};
}

}  // namespace

int main(int argc, char** argv) {
  std::int32_t threads = 0;
  std::int32_t repeats = 5;
  double density = 0.10;
  Shape shape;
  std::string dtype = "f32";
  std::vector<std::int32_t> contexts = {2048, 3072, 4096, 6144, 8192, 16384, 32768};
  std::string json_path;
  bool cpu_time = false;
  CLI::App app{"select + unite + attend beside dense, on the CPU"};
  app.add_option("--threads", threads, "0: every core");
  app.add_option("--repeats", repeats, "timed runs")->check(CLI::Range(1, 1000));
  app.add_option("--contexts", contexts, "tokens, chunk included")->delimiter(',');
  app.add_option("--density", density, "past pages read by mode adaptive")->check(CLI::Range(0.001, 1.0));
  app.add_option("--q-heads", shape.num_q_heads, "Hq");
  app.add_option("--kv-heads", shape.num_kv_heads, "Hkv");
  app.add_option("--head-dim", shape.head_dim, "D");
  app.add_option("--chunk", shape.chunk, "C");
  app.add_option("--page", shape.page_tokens, "P");
  app.add_option("--dtype", dtype, "of K and V")->check(CLI::IsMember({"f32", "bf16"}));
  app.add_option("--json", json_path, "write the figures to this file");
  app.add_flag("--cpu-time", cpu_time, "CPU seconds, for one thread on a busy machine");
  CLI11_PARSE(app, argc, argv);
  if (!bench::use_cpu_time(cpu_time, threads)) return 2;
  shape.dtype = dtype == "f32" ? DType::kF32 : DType::kBF16;

  ThreadPool pool(threads);
  const CpuKernel kernel = best_cpu_kernel(shape.dtype);
  fmt::print("{} time   threads {}   kernel {} ({})   D={} Hq={} Hkv={} C={} P={} {}\n", bench::clock_name(),
             pool.num_threads(), cpu_kernel_name(kernel), cpu_attention_target(), shape.head_dim, shape.num_q_heads,
             shape.num_kv_heads, shape.chunk, shape.page_tokens, dtype);
  UnionOptions adaptive{.mode = UnionMode::kAdaptive};
  adaptive.cost = cpu_cost_model(kernel);
  nlohmann::json rows = nlohmann::json::array();
  std::int32_t pays_from = 0;  // least context from which on the default policy gains
  for (const std::int32_t context : contexts) {
    if (context <= shape.chunk) {
      fmt::print(stderr, "step_cpu_bench: context {} holds no past beside a chunk of {}\n", context, shape.chunk);
      return 2;
    }
    Step step(shape, context, pool);
    const StepTimes dense = median_times(repeats, [&] { return step.dense(); });
    fmt::print("L={}\n", context);
    nlohmann::json row = {{"context", context}, {"modes", nlohmann::json::array()}};
    row["modes"].push_back(report("dense", dense, dense.total()));
    const float share = share_for_density(step, density, adaptive);
    row["share"] = share;
    for (const UnionMode mode : {UnionMode::kPaper, UnionMode::kTile, UnionMode::kAdaptive}) {
      UnionOptions options = adaptive;
      options.mode = mode;
      const StepTimes times = median_times(repeats, [&] { return step.sparse(share, {}, options, false); });
      row["modes"].push_back(report(union_mode_name(mode), times, dense.total()));
    }
    const float default_share = MeanKeyOptions().share;
    const StepTimes times = median_times(repeats, [&] { return step.sparse(default_share, {}, adaptive, true); });
    row["modes"].push_back(report("default policy", times, dense.total()));
    if (times.total() * 1.05 > dense.total()) {  // a gain below 5 % is noise
      pays_from = 0;
    } else if (pays_from == 0) {
      pays_from = context;
    }
    rows.push_back(row);
  }
  fmt::print("the default policy gains from L={} on\n", pays_from);
  return bench::write_json(json_path, {{"backend", "cpu"},
                                       {"kernel", cpu_kernel_name(kernel)},
                                       {"target", cpu_attention_target()},
                                       {"clock", bench::clock_name()},
                                       {"threads", pool.num_threads()},
                                       {"repeats", repeats},
                                       {"num_q_heads", shape.num_q_heads},
                                       {"num_kv_heads", shape.num_kv_heads},
                                       {"head_dim", shape.head_dim},
                                       {"chunk", shape.chunk},
                                       {"page_tokens", shape.page_tokens},
                                       {"dtype", dtype},
                                       {"wanted_density", density},
                                       {"pays_from_tokens", pays_from},
                                       {"contexts", rows}});
}
