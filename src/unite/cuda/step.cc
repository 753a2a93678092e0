// Host side of the step on the device: checks of pointers, and the launches.
#include <fmt/format.h>

#include <numbers>

#include "compact/step_cuda.h"
#include "src/core/cuda_status.h"
#include "src/core/refusal.h"
#include "src/select/cuda/launch.h"
#include "src/select/cuda/twin.h"
#include "src/select/mean_key.h"
#include "src/unite/cuda/checks.h"
#include "src/unite/cuda/launch.h"
#include "src/unite/cuda/step_layout.h"

namespace compact {
namespace {

constexpr Refusal kRefuse{"step (cuda)"};

// wgmma is 9.x only.
Result<CudaBackend> select_backend(CudaBackend wanted, int major) {
  switch (wanted) {
    case CudaBackend::kAuto: return major == 9 ? CudaBackend::kSm90 : CudaBackend::kSm80;
    case CudaBackend::kSm80: return wanted;
    case CudaBackend::kSm90:
      if (major != 9) return kRefuse.missing("backend sm90 on compute capability {}.x; 9.0", major);
      return wanted;
  }
  return kRefuse.wrong("backend is {}; auto (0), sm90 (1), sm80 (2)", static_cast<std::int32_t>(wanted));
}

Status check_select(const CudaStepInput& input, const CudaMeanKeyInput& select) {
  CA_RETURN_IF_ERROR(check_mean_key_options(select.options, {}));
  CA_RETURN_IF_ERROR(check_mean_key_twin(kRefuse, select.options));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("mean_k", select.mean_k, 16));
  return check_queries(
      kRefuse, input,
      {select.q, select.q_token_stride, select.q_head_stride, select.dtype, select.head_dim, select.softmax_scale});
}

// Lists from `mask`; null: of all pages.
Status unite(const StepLayout& layout, const CudaStepInput& input, const std::uint64_t* mask,
             const CudaPageLists& lists, void* workspace, std::int64_t workspace_bytes, void* stream) {
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("lists.num_units", lists.num_units, alignof(std::int32_t)));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (layout.unite_trees == 0) {
    return cuda_status(kRefuse.caller, cudaMemsetAsync(lists.num_units, 0, sizeof(std::int32_t), cuda_stream),
                       "no units");
  }
  CA_RETURN_IF_ERROR(check_step_pointers(kRefuse, input));
  if (layout.sizes.max_units > 0) {  // without query rows there are no units, but sums of every chunk
    CA_RETURN_IF_ERROR(kRefuse.check_pointer("lists.units", lists.units, alignof(AttentionUnit)));
    CA_RETURN_IF_ERROR(kRefuse.check_pointer("lists.page_ids", lists.page_ids, alignof(std::int32_t)));
  }
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("lists.stats", lists.stats, alignof(UnionStats)));
  CA_RETURN_IF_ERROR(check_workspace(kRefuse, layout, workspace, workspace_bytes));
  CA_ASSIGN_OR_RETURN(const int major, device_major(kRefuse));
  UniteArgs args = unite_args(layout, input, mask, lists, workspace);
  args.dense = mask == nullptr;
  return cuda_status(kRefuse.caller, launch_unite(args, layout.unite_trees, major >= kPdlMajor, cuda_stream),
                     "launch of the union kernel");
}

}  // namespace

Result<CudaStepSizes> step_cuda_sizes(const CudaStepInput& input) {
  CA_ASSIGN_OR_RETURN(const StepLayout layout, lay_out_step(input));
  return layout.sizes;
}

Status plan_step_cuda(const CudaStepInput& input, std::int32_t* error, void* workspace, std::int64_t workspace_bytes,
                      void* stream) {
  CA_ASSIGN_OR_RETURN(const StepLayout layout, lay_out_step(input));
  if (layout.plan_ctas == 0) return {};
  CA_RETURN_IF_ERROR(check_step_pointers(kRefuse, input));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("error", error, alignof(std::int32_t)));
  CA_RETURN_IF_ERROR(check_workspace(kRefuse, layout, workspace, workspace_bytes));
  CA_ASSIGN_OR_RETURN(const int major, device_major(kRefuse));
  const PlanArgs args = plan_args(layout, input, error, workspace);
  return cuda_status(kRefuse.caller,
                     launch_plan_step(args, layout.plan_ctas, major >= kPdlMajor, static_cast<cudaStream_t>(stream)),
                     "launch of the plan kernel");
}

Status select_mean_key_cuda(const CudaStepInput& input, const CudaMeanKeyInput& select, std::uint64_t* mask,
                            std::uint64_t* nonfinite_rows, void* workspace, std::int64_t workspace_bytes,
                            void* stream) {
  CA_ASSIGN_OR_RETURN(const StepLayout layout, lay_out_step(input));
  if (layout.select_tiles == 0) return {};
  CA_RETURN_IF_ERROR(check_step_pointers(kRefuse, input));
  CA_RETURN_IF_ERROR(check_select(input, select));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("mask", mask, alignof(std::uint64_t)));
  CA_RETURN_IF_ERROR(check_workspace(kRefuse, layout, workspace, workspace_bytes));
  CA_ASSIGN_OR_RETURN(const int major, device_major(kRefuse));
  CA_ASSIGN_OR_RETURN(const CudaBackend backend, select_backend(select.backend, major));
  const StepShape& s = layout.shape;
  const std::int32_t packed = mean_key_block_tokens(TileShape::kPacked, s.group, s.page_tokens);
  if (s.mask_heads != s.num_kv_heads || s.block_tokens != packed) {
    return kRefuse.wrong("mean-key: the step's mask has {} heads and blocks of {} tokens; {} and {}", s.mask_heads,
                         s.block_tokens, s.num_kv_heads, packed);
  }
  const MeanKeyArgs args{.tables = layout.tables(workspace),
                         .page_tables = input.page_tables,
                         .page_table_stride = input.page_table_stride,
                         .mean_tokens = input.mean_tokens,
                         .q = static_cast<const std::uint16_t*>(select.q),
                         .q_token_stride = select.q_token_stride,
                         .q_head_stride = select.q_head_stride,
                         .mean_k = static_cast<const std::uint16_t*>(select.mean_k),
                         .dtype = select.dtype,
                         .head_dim = select.head_dim,
                         .num_kv_heads = s.num_kv_heads,
                         .group = s.group,
                         .page_tokens = s.page_tokens,
                         .max_blocks = s.max_blocks,
                         .max_pairs = s.max_pairs,
                         .words_per_row = s.words_per_row,
                         .scale_log2 = static_cast<float>(select.softmax_scale * std::numbers::log2e),
                         .inverse_scale = static_cast<float>(1 / (select.softmax_scale * std::numbers::log2e)),
                         .share = select.options.share,
                         .head_shares = select.head_shares,
                         .lift = select.options.lift,
                         .mask = mask,
                         .nonfinite_rows = reinterpret_cast<unsigned long long*>(nonfinite_rows)};
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return cuda_status(kRefuse.caller,
                     backend == CudaBackend::kSm90 ? launch_mean_key_sm90(args, cuda_stream)
                                                   : launch_mean_key_sm80(args, major >= kPdlMajor, cuda_stream),
                     "launch of the mean-key kernel");
}

Status build_page_lists_cuda(const CudaStepInput& input, const std::uint64_t* mask, const CudaPageLists& lists,
                             void* workspace, std::int64_t workspace_bytes, void* stream) {
  CA_ASSIGN_OR_RETURN(const StepLayout layout, lay_out_step(input));
  // Without query rows there is no mask.
  if (layout.sizes.max_units > 0) CA_RETURN_IF_ERROR(kRefuse.check_pointer("mask", mask, alignof(std::uint64_t)));
  return unite(layout, input, mask, lists, workspace, workspace_bytes, stream);
}

Status build_dense_lists_cuda(const CudaStepInput& input, const CudaPageLists& lists, void* workspace,
                              std::int64_t workspace_bytes, void* stream) {
  CA_ASSIGN_OR_RETURN(const StepLayout layout, lay_out_step(input));
  return unite(layout, input, nullptr, lists, workspace, workspace_bytes, stream);
}

Status page_means_cuda(const CudaStepInput& input, const PagedKvView& kv, void* mean_k, std::int32_t* mean_tokens,
                       void* stream) {
  CA_ASSIGN_OR_RETURN(const StepLayout layout, lay_out_step(input));
  CA_RETURN_IF_ERROR(check_cache(kRefuse, input, kv));
  const std::int32_t max_pages = layout.shape.list_capacity;
  if (input.num_chunks == 0 || max_pages == 0) return {};
  if (std::int64_t{input.num_chunks} * max_pages > 0x7fffffff) {
    return kRefuse.wrong("{} chunks of up to {} pages are too many for one call", input.num_chunks, max_pages);
  }
  CA_RETURN_IF_ERROR(check_step_pointers(kRefuse, input));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("kv.k", kv.k, 16));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("mean_k", mean_k, 16));
  CA_ASSIGN_OR_RETURN(const int major, device_major(kRefuse));
  const PageMeansArgs args{.kv = kv,
                           .chunks = input.chunks,
                           .page_tables = input.page_tables,
                           .page_table_stride = input.page_table_stride,
                           .num_chunks = input.num_chunks,
                           .num_table_rows = input.num_table_rows,
                           .max_pages = max_pages,
                           .mean_k = static_cast<std::uint16_t*>(mean_k),
                           .mean_tokens = mean_tokens};
  return cuda_status(kRefuse.caller, launch_page_means(args, major >= kPdlMajor, static_cast<cudaStream_t>(stream)),
                     "launch of the means kernel");
}

}  // namespace compact
