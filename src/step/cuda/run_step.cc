// A layer's step: where its intermediate results lie, and the calls in order.
#include <fmt/format.h>

#include "compact/run_step_cuda.h"
#include "src/core/refusal.h"

namespace compact {
namespace {

constexpr Refusal kRefuse{"step (cuda)"};

constexpr std::int64_t kAlignment = 256;

// Byte offsets in the workspace, which begins with the tables of the plan.
struct RunLayout {
  CudaStepSizes sizes;
  std::int64_t mask = 0;       // [mask_words]
  std::int64_t units = 0;      // [max_units]
  std::int64_t num_units = 0;  // [1]
  std::int64_t page_ids = 0;   // [num_list_entries]
  std::int64_t stats = 0;      // [num_stats]
  std::int64_t select = 0;
  std::int64_t select_bytes = 0;
  std::int64_t attention = 0;
  std::int64_t attention_bytes = 0;
  std::int64_t bytes = 0;
};

// All pages, asked for or by the selector's nature: lists are made without a mask.
bool is_dense(const CudaStepLayer& layer) {
  return layer.dense || (layer.select.options != nullptr && layer.select.options->name == "dense");
}

CudaSelectInput select_input(const CudaStepLayer& layer) {
  CudaSelectInput select = layer.select;
  select.kv = layer.kv;
  return select;
}

CudaAttentionInput attention_input(const CudaStepInput& step, const CudaStepLayer& layer, const CudaStepSizes& sizes) {
  CudaAttentionInput input;
  input.q = layer.select.q;
  input.q_token_stride = layer.select.q_token_stride;
  input.q_head_stride = layer.select.q_head_stride;
  input.num_q_tokens = step.num_q_tokens;
  input.num_q_heads = step.num_q_heads;
  input.kv = layer.kv;
  input.max_units = sizes.max_units;
  input.heads_per_unit = sizes.heads_per_unit;
  input.softmax_scale = layer.select.softmax_scale;
  return input;
}

Status check_layer(const CudaStepInput& step, const CudaStepLayer& layer) {
  const PagedKvView& kv = layer.kv;
  if (kv.page_tokens != step.page_tokens || kv.num_kv_heads != step.num_kv_heads || kv.num_pages != step.num_pages) {
    return kRefuse.wrong("the cache has {} pages of {} tokens and {} KV heads; the step {}, {}, {}", kv.num_pages,
                         kv.page_tokens, kv.num_kv_heads, step.num_pages, step.page_tokens, step.num_kv_heads);
  }
  if (kv.dtype != layer.select.dtype || kv.head_dim != layer.select.head_dim) {
    return kRefuse.wrong("the cache has dtype {} and head dimension {}; the queries {}, {}",
                         static_cast<std::int32_t>(kv.dtype), kv.head_dim,
                         static_cast<std::int32_t>(layer.select.dtype), layer.select.head_dim);
  }
  return {};
}

Result<RunLayout> lay_out_run(const CudaStepInput& step, const CudaStepLayer& layer) {
  CA_RETURN_IF_ERROR(check_layer(step, layer));
  RunLayout layout;
  CA_ASSIGN_OR_RETURN(layout.sizes, step_cuda_sizes(step));
  const CudaStepSizes& sizes = layout.sizes;
  layout.bytes = sizes.workspace_bytes;
  const auto take = [&layout](std::int64_t bytes) {
    const std::int64_t offset = layout.bytes;
    layout.bytes += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  };
  layout.mask = take(sizes.mask_words * std::int64_t{sizeof(std::uint64_t)});
  layout.units = take(sizes.max_units * std::int64_t{sizeof(AttentionUnit)});
  layout.num_units = take(sizeof(std::int32_t));
  layout.page_ids = take(sizes.num_list_entries * std::int64_t{sizeof(std::int32_t)});
  layout.stats = take(sizes.num_stats * std::int64_t{sizeof(UnionStats)});
  if (!is_dense(layer)) {
    CA_ASSIGN_OR_RETURN(layout.select_bytes, select_cuda_bytes(step, select_input(layer)));
  }
  layout.select = take(layout.select_bytes);
  if (sizes.max_units > 0) {
    CA_ASSIGN_OR_RETURN(layout.attention_bytes,
                        attend_cuda_workspace_bytes(attention_input(step, layer, sizes), layer.attention));
  }
  layout.attention = take(layout.attention_bytes);
  return layout;
}

}  // namespace

Result<std::int64_t> run_step_cuda_bytes(const CudaStepInput& step, const CudaStepLayer& layer) {
  CA_ASSIGN_OR_RETURN(const RunLayout layout, lay_out_run(step, layer));
  return layout.bytes;
}

Status run_step_cuda(const CudaStepInput& step, const CudaStepLayer& layer, void* workspace,
                     std::int64_t workspace_bytes, void* stream) {
  CA_ASSIGN_OR_RETURN(const RunLayout layout, lay_out_run(step, layer));
  if (workspace == nullptr) return kRefuse.wrong("workspace is null");
  if (workspace_bytes < layout.bytes) {
    return kRefuse.wrong("workspace_bytes is {}; at least {} (run_step_cuda_bytes)", workspace_bytes, layout.bytes);
  }
  char* base = static_cast<char*>(workspace);
  auto* mask = reinterpret_cast<std::uint64_t*>(base + layout.mask);
  const CudaPageLists lists{
      .units = reinterpret_cast<AttentionUnit*>(base + layout.units),
      .num_units = reinterpret_cast<std::int32_t*>(base + layout.num_units),
      .page_ids = reinterpret_cast<std::int32_t*>(base + layout.page_ids),
      .stats = layer.stats != nullptr ? layer.stats : reinterpret_cast<UnionStats*>(base + layout.stats),
      .reasons = layer.reasons};
  const std::int64_t step_bytes = layout.sizes.workspace_bytes;
  if (is_dense(layer)) {
    CA_RETURN_IF_ERROR(build_dense_lists_cuda(step, lists, workspace, step_bytes, stream));
  } else {
    CA_RETURN_IF_ERROR(select_cuda(step, select_input(layer), mask, layer.nonfinite_rows, workspace, step_bytes,
                                   base + layout.select, layout.select_bytes, stream));
    CA_RETURN_IF_ERROR(build_page_lists_cuda(step, mask, lists, workspace, step_bytes, stream));
  }
  if (layout.sizes.max_units == 0) return {};
  CudaAttentionInput attention = attention_input(step, layer, layout.sizes);
  attention.units = lists.units;
  attention.num_units = lists.num_units;
  attention.page_ids = lists.page_ids;
  return attend_cuda(attention, layer.output, layer.attention, base + layout.attention, layout.attention_bytes, stream);
}

}  // namespace compact
