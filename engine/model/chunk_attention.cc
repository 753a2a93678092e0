#include "engine/model/chunk_attention.h"

#include <fmt/format.h>

#include <algorithm>
#include <span>
#include <utility>

#include "engine/model/stopwatch.h"

namespace compact::engine {
namespace {

// Adds the seconds of its own lifetime to a sum.
class StageTimer {
 public:
  explicit StageTimer(double& total_seconds) : total_seconds_(total_seconds) {}
  ~StageTimer() { total_seconds_ += stopwatch_.seconds(); }
  StageTimer(const StageTimer&) = delete;
  StageTimer& operator=(const StageTimer&) = delete;

 private:
  double& total_seconds_;
  Stopwatch stopwatch_;
};

}  // namespace

Result<ChunkAttention> ChunkAttention::create(const SparsityOptions& options, std::int32_t num_layers,
                                              std::int32_t num_q_heads, std::int32_t num_kv_heads,
                                              float softmax_scale) {
  const std::int32_t group = num_q_heads / num_kv_heads;
  const std::int32_t heads_per_unit = options.unite.heads_per_unit;
  if (heads_per_unit < 0 || (heads_per_unit > 0 && group % heads_per_unit != 0)) {
    return invalid_argument(fmt::format(
        "heads per unit is {}\n  allowed: a divisor of the model's {} query heads per KV head", heads_per_unit, group));
  }
  ChunkAttention attention;
  CA_ASSIGN_OR_RETURN(attention.selector_, make_selector(options.selector));
  attention.options_ = options;
  attention.num_q_heads_ = num_q_heads;
  attention.num_kv_heads_ = num_kv_heads;
  attention.softmax_scale_ = softmax_scale;
  attention.reports_.resize(static_cast<std::size_t>(num_layers));
  return attention;
}

Status ChunkAttention::run(std::int32_t layer, RequestId request, const ChunkView& chunk, ConstRows q, ConstRows k,
                           ConstRows v, bool dense, PagedKvCache& cache, MutableRows o, ThreadPool& pool,
                           const PreRope& pre) {
  LayerReport& report = reports_[static_cast<std::size_t>(layer)];
  const PagedKvView kv = cache.layer(layer);
  {
    const StageTimer timer(report.append_seconds);
    CA_RETURN_IF_ERROR(cache.write(request, layer, chunk.chunk_start, k, v, pool, pre.k));
  }
  if (observer_) CA_RETURN_IF_ERROR(observer_({layer, chunk, q, cache, softmax_scale_, pool, pre.q}));

  const std::span<const ChunkView> chunks(&chunk, 1);
  options_.unite.cost = cpu_cost_model(best_cpu_kernel(kv.dtype));
  const UnionInput union_input{chunks,       num_q_heads_,    num_kv_heads_, kv.page_tokens,
                               kv.num_pages, options_.forced, options_.unite};
  DenseReason reason = crossover_before_selection(options_.crossover, chunk, kv.page_tokens);
  if (dense && reason != DenseReason::kFirstChunk) reason = DenseReason::kRequested;
  if (selector_->name() == "dense") reason = DenseReason::kSelector;
  if (reason == DenseReason::kNone) {
    {
      const StageTimer timer(report.select_seconds);
      const SelectInput select_input{.chunks = chunks,
                                     .q = q,
                                     .summaries = cache.summaries(layer),
                                     .page_tokens = kv.page_tokens,
                                     .softmax_scale = softmax_scale_,
                                     .kv = kv,
                                     .layer = layer,
                                     .forced = options_.forced,
                                     .q_pre = pre.q};
      CA_RETURN_IF_ERROR(selector_->select(select_input, mask_, pool));
    }
    const StageTimer timer(report.unite_seconds);
    report.nonfinite_rows += mask_.nonfinite_rows;
    CA_RETURN_IF_ERROR(build_page_lists(union_input, mask_, lists_, pool));
    CA_RETURN_IF_ERROR(crossover_after_union(options_.crossover, union_input, lists_, std::span(&reason, 1)));
  } else {
    const StageTimer timer(report.unite_seconds);
    CA_RETURN_IF_ERROR(build_dense_lists(union_input, lists_));
  }
  ++report.chunks_by_reason[static_cast<std::size_t>(reason)];
  for (const UnionStats& stats : lists_.chunk_stats) report.stats.add(stats);
  if (options_.trace_pages) trace(union_input, report);

  const StageTimer timer(report.attend_seconds);
  const AttentionInput attention_input{q, kv, lists_.units, lists_.page_ids, lists_.heads_per_unit, softmax_scale_};
  return attend_cpu(attention_input, AttentionOutput{o, nullptr}, pool);
}

std::vector<LayerReport> ChunkAttention::take_reports() {
  return std::exchange(reports_, std::vector<LayerReport>(reports_.size()));
}

void ChunkAttention::trace(const UnionInput& input, LayerReport& report) const {
  std::vector<std::vector<std::int32_t>> pages(static_cast<std::size_t>(num_kv_heads_));
  for (const AttentionUnit& unit : lists_.units) {
    const std::int32_t list_pages = (unit.list_tokens + input.page_tokens - 1) / input.page_tokens;
    const auto begin = lists_.logical_pages.begin() + unit.list_begin;
    // Sub-groups of a KV head have lists of their own; the picture shows what the KV head read in all.
    std::vector<std::int32_t> merged;
    std::vector<std::int32_t>& of_head = pages[static_cast<std::size_t>(unit.kv_head)];
    std::set_union(of_head.begin(), of_head.end(), begin, begin + list_pages, std::back_inserter(merged));
    of_head = std::move(merged);
  }
  report.traced_pages.push_back(std::move(pages));
}

}  // namespace compact::engine
