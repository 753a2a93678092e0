/// One layer's attention for one chunk: append -> select -> unite -> attend, timed and counted.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "compact/attention.h"
#include "compact/block_union.h"
#include "compact/paged_kv.h"
#include "compact/selector.h"
#include "compact/status.h"
#include "compact/thread_pool.h"

namespace compact::engine {

struct SparsityOptions {
  SelectorOptions selector;
  ForcedPages forced;
  CrossoverPolicy crossover;
  UnionOptions unite;
  bool trace_pages = false;  // keep which pages every KV head read, for pictures
};

/// What a layer did over the chunks of a prefill.
struct LayerReport {
  double append_seconds = 0;
  double select_seconds = 0;
  double unite_seconds = 0;
  double attend_seconds = 0;
  UnionStats stats;
  std::array<std::int64_t, kNumDenseReasons> chunks_by_reason{};  // [DenseReason]
  std::int64_t nonfinite_rows = 0;
  bool selected_on_host = false;  // a backend that is not the CPU had the CPU select
  /// [chunk][KV head] logical pages read, ascending; filled with trace_pages only.
  std::vector<std::vector<std::vector<std::int32_t>>> traced_pages;

  /// Selection, union and attention: what a sparse method adds and what it saves.
  [[nodiscard]] double attention_seconds() const noexcept { return select_seconds + unite_seconds + attend_seconds; }
};

/// Queries and keys of a chunk before RoPE; empty unless the cache keeps gate pools.
struct PreRope {
  ConstRows q{};  // [C, Hq, D]
  ConstRows k{};  // [C, Hkv, D]
};

/// What a layer's attention is about to work on: its keys are appended, nothing is selected yet.
struct AttentionStep {
  std::int32_t layer = 0;
  const ChunkView& chunk;
  ConstRows q;  // [C, Hq, D]  rotated
  const PagedKvCache& cache;
  float softmax_scale = 0;
  ThreadPool& pool;
  ConstRows q_pre{};  // [C, Hq, D]  before RoPE; empty unless the cache keeps gate pools
};
using AttentionObserver = std::function<Status(const AttentionStep& step)>;

class ChunkAttention {
 public:
  /// Errors: those of make_selector; kInvalidArgument if unite.heads_per_unit does not divide G.
  [[nodiscard]] static Result<ChunkAttention> create(const SparsityOptions& options, std::int32_t num_layers,
                                                     std::int32_t num_q_heads, std::int32_t num_kv_heads,
                                                     float softmax_scale);

  /// What the cache must carry for the selector.
  [[nodiscard]] SelectorNeeds needs() const noexcept { return selector_->needs(); }

  /// q: [C, Hq, D] and k, v: [C, Hkv, D], rotated. Appends k and v at `chunk.chunk_start` and writes o: [C, Hq, D].
  /// The chunk's page table comes from the cache. `dense` reads every page without a selection (decode steps, a dense
  /// final chunk) and is counted as kRequested. `pre` must be given if the cache keeps gate pools.
  [[nodiscard]] Status run(std::int32_t layer, RequestId request, const ChunkView& chunk, ConstRows q, ConstRows k,
                           ConstRows v, bool dense, PagedKvCache& cache, MutableRows o, ThreadPool& pool,
                           const PreRope& pre = {});

  /// Called by every run from now on, for measurements. Its errors end the run.
  void observe(AttentionObserver observer) { observer_ = std::move(observer); }

  [[nodiscard]] const std::vector<LayerReport>& reports() const noexcept { return reports_; }
  /// Forgets what was counted, e.g. when prefill ends and decode begins.
  [[nodiscard]] std::vector<LayerReport> take_reports();

 private:
  ChunkAttention() = default;
  void trace(const UnionInput& input, LayerReport& report) const;

  SparsityOptions options_;
  std::unique_ptr<Selector> selector_;
  AttentionObserver observer_;
  std::int32_t num_q_heads_ = 0;
  std::int32_t num_kv_heads_ = 0;
  float softmax_scale_ = 0;
  std::vector<LayerReport> reports_;  // [num_layers]
  BlockMask mask_;                    // reused from layer to layer
  PageLists lists_;
};

}  // namespace compact::engine
