#include "engine/bench/step_cpu.h"

#include <cmath>
#include <functional>
#include <memory>
#include <utility>

#include "compact/paged_kv.h"
#include "engine/bench/measure.h"

namespace compact::engine {
namespace {

// A request of L tokens in a cache of one layer, and the queries of its last chunk. Pages belong to topics, runs of
// queries ask for a few topics: without structure every page would be as good as any other.
class Step {
 public:
  static Result<std::unique_ptr<Step>> make(const StepShape& shape, std::int32_t context, ThreadPool& pool) {
    CA_ASSIGN_OR_RETURN(PagedKvCache cache,
                        PagedKvCache::create({.num_layers = 1,
                                              .num_kv_heads = shape.num_kv_heads,
                                              .head_dim = shape.head_dim,
                                              .page_tokens = shape.page_tokens,
                                              .num_pages = (context + shape.page_tokens - 1) / shape.page_tokens,
                                              .dtype = shape.dtype}));
    std::unique_ptr<Step> step(new Step(shape, std::move(cache), pool));
    CA_RETURN_IF_ERROR(step->fill(context));
    return step;
  }

  // Every page, without a selection.
  Result<StepTimes> dense() {
    StepTimes times;
    CA_RETURN_IF_ERROR(timed(times.unite, [&] { return build_dense_lists(union_input({}, {}), lists_); }));
    CA_RETURN_IF_ERROR(attend(times.attend));
    times.stats = lists_.chunk_stats[0];
    return times;
  }

  Result<StepTimes> sparse(float share, const UnionOptions& options, bool crossover) {
    SelectorOptions selector_options;
    selector_options.mean_key.share = share;
    CA_ASSIGN_OR_RETURN(const auto selector, make_selector(selector_options));
    const SelectInput select{
        .chunks = {&chunk_, 1},
        .q = contiguous_rows<const float>(q_.data(), shape_.chunk, shape_.num_q_heads, shape_.head_dim),
        .summaries = cache_.summaries(0),
        .page_tokens = shape_.page_tokens,
        .softmax_scale = scale()};
    StepTimes times;
    CA_RETURN_IF_ERROR(timed(times.select, [&] { return selector->select(select, mask_, pool_); }));
    const auto unite = [&]() -> Status {
      const UnionInput input = union_input({}, options);
      CA_RETURN_IF_ERROR(build_page_lists(input, mask_, lists_, pool_));
      return crossover ? crossover_after_union({}, input, lists_, {&times.reason, 1}) : Status();
    };
    CA_RETURN_IF_ERROR(timed(times.unite, unite));
    CA_RETURN_IF_ERROR(attend(times.attend));
    times.stats = lists_.chunk_stats[0];
    return times;
  }

 private:
  Step(const StepShape& shape, PagedKvCache cache, ThreadPool& pool)
      : shape_(shape), pool_(pool), cache_(std::move(cache)) {}

  static constexpr std::int32_t kTopics = 64;
  static constexpr std::int32_t kAppendTokens = 4096;
  static constexpr float kTopicOfKey = 1.0F;    // size of the topic in K, beside noise of 1
  static constexpr float kTopicOfQuery = 1.5F;  // and in Q

  template <class Body>
  static Status timed(double& seconds, const Body& body) {
    Status status;
    seconds = bench::seconds([&] { status = body(); });
    return status;
  }

  [[nodiscard]] float scale() const { return 1.0F / std::sqrt(static_cast<float>(shape_.head_dim)); }
  [[nodiscard]] const float* topic(std::uint32_t index, std::int32_t kv_head) const {
    const auto at = static_cast<std::int64_t>(index % kTopics) * shape_.num_kv_heads + kv_head;
    return topics_.data() + at * shape_.head_dim;
  }

  Status fill(std::int32_t context) {
    topics_ = bench::random_floats(static_cast<std::size_t>(kTopics * shape_.num_kv_heads * shape_.head_dim), 1);
    const RequestId request = cache_.add_request();
    for (std::int32_t start = 0; start < context; start += kAppendTokens) {
      CA_RETURN_IF_ERROR(append(request, start, context));
    }
    CA_ASSIGN_OR_RETURN(table_, cache_.page_table(request));
    chunk_ = {.chunk_tokens = shape_.chunk, .chunk_start = context - shape_.chunk, .page_table = table_.data()};
    make_queries();
    o_.resize(q_.size());
    return {};
  }

  Status append(RequestId request, std::int32_t start, std::int32_t context) {
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
    CA_RETURN_IF_ERROR(cache_.extend(request, tokens));
    return cache_.write(request, 0, start, rows_of(k), rows_of(v), pool_);
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

  Status attend(double& seconds) {
    AttentionInput input;
    input.q = contiguous_rows<const float>(q_.data(), shape_.chunk, shape_.num_q_heads, shape_.head_dim);
    input.kv = cache_.layer(0);
    input.units = lists_.units;
    input.page_ids = lists_.page_ids;
    input.heads_per_unit = lists_.heads_per_unit;
    input.softmax_scale = scale();
    const AttentionOutput output{.o = contiguous_rows(o_.data(), shape_.chunk, shape_.num_q_heads, shape_.head_dim)};
    return timed(seconds, [&] { return attend_cpu(input, output, pool_); });
  }

  StepShape shape_;
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
Result<float> share_for_density(Step& step, double density, const UnionOptions& options) {
  float low = 1e-6F;
  float high = 1.0F;
  for (int i = 0; i < 24; ++i) {
    const float middle = std::sqrt(low * high);
    CA_ASSIGN_OR_RETURN(const StepTimes times, step.sparse(middle, options, false));
    const double seen = times.stats.density();
    if (std::abs(seen / density - 1) < 0.02) return middle;
    (seen > density ? low : high) = middle;
  }
  return high;
}

Result<StepTimes> median_times(std::int32_t repeats, const std::function<Result<StepTimes>()>& run) {
  std::vector<double> select, unite, attend;
  StepTimes times;
  for (std::int32_t i = 0; i < repeats; ++i) {
    CA_ASSIGN_OR_RETURN(times, run());
    select.push_back(times.select);
    unite.push_back(times.unite);
    attend.push_back(times.attend);
  }
  times.select = bench::median(select);
  times.unite = bench::median(unite);
  times.attend = bench::median(attend);
  return times;
}

}  // namespace

Result<std::vector<StepRow>> bench_step_cpu(const StepShape& shape, std::int32_t context, double density,
                                            std::int32_t repeats, ThreadPool& pool) {
  if (shape.chunk < 1 || context <= shape.chunk) {
    return invalid_argument(fmt::format("context {} holds no past beside a chunk of {}", context, shape.chunk));
  }
  if (shape.num_kv_heads < 1 || shape.num_q_heads < 1 || shape.num_q_heads % shape.num_kv_heads != 0) {
    return invalid_argument(
        fmt::format("{} query heads; a multiple of {} KV heads", shape.num_q_heads, shape.num_kv_heads));
  }
  CA_ASSIGN_OR_RETURN(const std::unique_ptr<Step> step, Step::make(shape, context, pool));
  UnionOptions adaptive{.mode = UnionMode::kAdaptive};
  adaptive.cost = cpu_cost_model(best_cpu_kernel(shape.dtype));
  std::vector<StepRow> rows;
  CA_ASSIGN_OR_RETURN(const StepTimes dense, median_times(repeats, [&] { return step->dense(); }));
  rows.push_back({"dense", 0, dense});
  CA_ASSIGN_OR_RETURN(const float share, share_for_density(*step, density, adaptive));
  for (const UnionMode mode : {UnionMode::kPaper, UnionMode::kTile, UnionMode::kAdaptive}) {
    UnionOptions options = adaptive;
    options.mode = mode;
    CA_ASSIGN_OR_RETURN(const StepTimes times,
                        median_times(repeats, [&] { return step->sparse(share, options, false); }));
    rows.push_back({union_mode_name(mode), share, times});
  }
  const float default_share = MeanKeyOptions().share;
  CA_ASSIGN_OR_RETURN(const StepTimes times,
                      median_times(repeats, [&] { return step->sparse(default_share, adaptive, true); }));
  rows.push_back({kStepDefaultPolicy, default_share, times});
  return rows;
}

}  // namespace compact::engine
