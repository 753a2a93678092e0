// The step of a layer: C structs to the C++ views, nothing else.
#include <fmt/format.h>

#include <cstddef>
#include <iterator>

#include "compact/run_step_cuda.h"
#include "src/capi/call.h"

namespace compact::capi {
namespace {

// The same bytes on both sides.
static_assert(sizeof(ca_step_chunk) == sizeof(CudaChunk));
static_assert(offsetof(ca_step_chunk, q_begin) == offsetof(CudaChunk, q_begin));
static_assert(offsetof(ca_step_chunk, chunk_tokens) == offsetof(CudaChunk, chunk_tokens));
static_assert(offsetof(ca_step_chunk, chunk_start) == offsetof(CudaChunk, chunk_start));
static_assert(offsetof(ca_step_chunk, table_row) == offsetof(CudaChunk, table_row));
static_assert(sizeof(ca_union_stats) == sizeof(UnionStats));
static_assert(offsetof(ca_union_stats, listed_row_pages) == offsetof(UnionStats, listed_row_pages));
static_assert(offsetof(ca_union_stats, wanted_row_pages) == offsetof(UnionStats, wanted_row_pages));
static_assert(offsetof(ca_union_stats, visible_row_pages) == offsetof(UnionStats, visible_row_pages));
static_assert(sizeof(DenseReason) == sizeof(std::int32_t));
static_assert(CA_DENSE_NONE == static_cast<int>(DenseReason::kNone));
static_assert(CA_DENSE_SELECTOR == static_cast<int>(DenseReason::kSelector));
static_assert(CA_DENSE_FIRST_CHUNK == static_cast<int>(DenseReason::kFirstChunk));
static_assert(CA_DENSE_SHORT_CONTEXT == static_cast<int>(DenseReason::kShortContext));
static_assert(CA_DENSE_HIGH_DENSITY == static_cast<int>(DenseReason::kHighDensity));
static_assert(CA_DENSE_REQUESTED == static_cast<int>(DenseReason::kRequested));
static_assert(CA_UNION_PAPER == static_cast<int>(UnionMode::kPaper));
static_assert(CA_UNION_SPAN == static_cast<int>(UnionMode::kSpan));
static_assert(CA_UNION_TILE == static_cast<int>(UnionMode::kTile));
static_assert(CA_UNION_ADAPTIVE == static_cast<int>(UnionMode::kAdaptive));
static_assert(sizeof(ca_step) == 360, "version 1");

constexpr const char* kSelectors[] = {"mean-key",   "static", "oracle", "sub-mean",
                                      "xattention", "quoka",  "random", "external"};
static_assert(std::size(kSelectors) == CA_SELECTOR_EXTERNAL + 1);
static_assert(CA_BUDGET_NATIVE == static_cast<int>(BudgetKind::kNative));
static_assert(CA_BUDGET_THRESHOLD == static_cast<int>(BudgetKind::kThreshold));
static_assert(CA_BUDGET_TOP == static_cast<int>(BudgetKind::kTopN));
static_assert(CA_BUDGET_MASS == static_cast<int>(BudgetKind::kMass));
static_assert(CA_BUDGET_DENSITY == static_cast<int>(BudgetKind::kDensity));

struct Call {
  SelectorOptions options;  // of layer.select
  CudaStepInput step;
  CudaStepLayer layer;

  Call() { layer.select.options = &options; }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
};

Status read_selector(const ca_step& s, Call& call) {
  if (s.selector < 0 || s.selector > CA_SELECTOR_EXTERNAL) {
    return invalid_argument(fmt::format("step.selector is {}; CA_SELECTOR_..., 0 to {}", s.selector,
                                        static_cast<int>(CA_SELECTOR_EXTERNAL)));
  }
  if (s.reserved != 0) return invalid_argument(fmt::format("step.reserved is {}; 0", s.reserved));
  SelectorOptions& options = call.options;
  options.name = kSelectors[s.selector];
  options.budget = {static_cast<BudgetKind>(s.budget), s.budget_value, s.min_pages, s.max_pages};
  options.mean_key.share = options.sub_mean.share = s.share;
  options.mean_key.lift = options.sub_mean.lift = s.lift;
  options.sub_mean.peak_weight = s.peak_weight;
  options.random.seed = s.seed;
  const auto set = [](auto& option, auto value) {
    if (value != 0) option = value;
  };
  set(options.sub_mean.temperature, s.temperature);
  set(options.xattention.mass, s.mass);
  set(options.xattention.stride, s.stride);
  set(options.quoka.picked_queries, s.picked_queries);
  set(options.quoka.kept_tokens, s.kept_tokens);
  set(options.random.share, s.random_share);
  CudaSelectInput& select = call.layer.select;
  select.layer = s.layer;
  select.head_thresholds = s.head_thresholds;
  select.summaries.sub_mean_k = const_cast<void*>(s.sub_mean_k);
  select.summaries.norm_k = const_cast<float*>(s.norm_k);
  select.words = s.mask_words;
  call.step.mask_heads = s.mask_heads;
  call.step.block_tokens = s.block_tokens;
  if (s.selector == CA_SELECTOR_EXTERNAL || s.selector == CA_SELECTOR_MEAN_KEY) return {};
  CA_ASSIGN_OR_RETURN(const CudaMaskShape shape,
                      cuda_mask_shape(options, s.num_q_heads, s.num_kv_heads, s.page_tokens));
  call.step.mask_heads = shape.mask_heads;
  call.step.block_tokens = shape.block_tokens;
  return {};
}

Status read_call(const ca_step* from, Call& call) {
  ca_step s;
  CA_RETURN_IF_ERROR(read_struct("step", from, sizeof(ca_step), s));
  CudaStepInput& step = call.step;
  step.chunks = reinterpret_cast<const CudaChunk*>(s.chunks);
  step.page_tables = s.page_tables;
  step.mean_tokens = s.mean_tokens;
  step.page_table_stride = s.page_table_stride;
  step.num_table_rows = s.num_table_rows;
  step.num_chunks = s.num_chunks;
  step.num_q_tokens = s.num_q_tokens;
  step.max_context_tokens = s.max_context_tokens;
  step.num_q_heads = s.num_q_heads;
  step.num_kv_heads = s.num_kv_heads;
  step.page_tokens = s.page_tokens;
  step.num_pages = s.num_pages;
  step.forced = {.sink_tokens = s.sink_tokens, .window_tokens = s.window_tokens};
  step.options.mode = static_cast<UnionMode>(s.union_mode);
  step.options.heads_per_unit = s.heads_per_unit;
  step.options.span_tokens = s.span_tokens;
  step.crosses_over = s.crosses_over != 0;
  step.crossover = {.min_context_tokens = s.min_context_tokens, .margin_1024ths = s.margin_1024ths};

  CudaStepLayer& layer = call.layer;
  const auto dtype = static_cast<DType>(s.dtype);
  layer.select.q = s.q;
  layer.select.q_token_stride = s.q_token_stride;
  layer.select.q_head_stride = s.q_head_stride;
  layer.select.summaries.mean_k = const_cast<void*>(s.mean_k);
  layer.select.dtype = dtype;
  layer.select.head_dim = s.head_dim;
  layer.select.softmax_scale = s.softmax_scale;
  layer.select.backend = static_cast<CudaBackend>(s.backend);
  layer.kv = {.k = s.k,
              .v = s.v,
              .dtype = dtype,
              .num_pages = s.num_pages,
              .num_kv_heads = s.num_kv_heads,
              .page_tokens = s.page_tokens,
              .head_dim = s.head_dim,
              .page_stride = s.kv_page_stride,
              .head_stride = s.kv_head_stride,
              .token_stride = s.kv_token_stride};
  layer.output = {.o = s.o, .o_token_stride = s.o_token_stride, .o_head_stride = s.o_head_stride, .lse = s.lse};
  layer.attention.backend = static_cast<CudaBackend>(s.backend);
  layer.dense = s.dense != 0;
  layer.stats = reinterpret_cast<UnionStats*>(s.stats);
  layer.reasons = reinterpret_cast<DenseReason*>(s.dense_reasons);
  layer.nonfinite_rows = s.nonfinite_rows;
  return read_selector(s, call);
}

}  // namespace
}  // namespace compact::capi

using namespace compact;

ca_status ca_step_cuda_workspace(const ca_step* step, int64_t* bytes, int32_t* num_stats) {
  return capi::call([&]() -> Status {
    if (bytes == nullptr) return invalid_argument("bytes is null");
    capi::Call call;
    CA_RETURN_IF_ERROR(capi::read_call(step, call));
    CA_ASSIGN_OR_RETURN(*bytes, run_step_cuda_bytes(call.step, call.layer));
    if (num_stats == nullptr) return {};
    CA_ASSIGN_OR_RETURN(const CudaStepSizes sizes, step_cuda_sizes(call.step));
    *num_stats = sizes.num_stats;
    return {};
  });
}

ca_status ca_step_cuda_mask_shape(const ca_step* step, int32_t* mask_heads, int32_t* max_blocks, int32_t* block_tokens,
                                  int32_t* words_per_row) {
  return capi::call([&]() -> Status {
    if (mask_heads == nullptr || max_blocks == nullptr || block_tokens == nullptr || words_per_row == nullptr) {
      return invalid_argument("mask_heads, max_blocks, block_tokens or words_per_row is null");
    }
    capi::Call call;
    CA_RETURN_IF_ERROR(capi::read_call(step, call));
    CA_ASSIGN_OR_RETURN(const CudaStepSizes sizes, step_cuda_sizes(call.step));
    *mask_heads = sizes.mask_heads;
    *max_blocks = sizes.max_blocks;
    *block_tokens = sizes.block_tokens;
    *words_per_row = sizes.words_per_row;
    return {};
  });
}

ca_status ca_step_plan_cuda(const ca_step* step, int32_t* device_error, void* workspace, int64_t workspace_bytes,
                            void* stream) {
  return capi::call([&]() -> Status {
    capi::Call call;
    CA_RETURN_IF_ERROR(capi::read_call(step, call));
    return plan_step_cuda(call.step, device_error, workspace, workspace_bytes, stream);
  });
}

ca_status ca_step_run_cuda(const ca_step* step, void* workspace, int64_t workspace_bytes, void* stream) {
  return capi::call([&]() -> Status {
    capi::Call call;
    CA_RETURN_IF_ERROR(capi::read_call(step, call));
    return run_step_cuda(call.step, call.layer, workspace, workspace_bytes, stream);
  });
}

const char* ca_step_device_error_text(int32_t device_error) {
  return cuda_step_error_text(static_cast<CudaStepError>(device_error));
}
