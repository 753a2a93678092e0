// Host side of the step on the device: checks of pointers, and the launches.
#include <fmt/format.h>

#include <cmath>
#include <numbers>

#include "compact/step_cuda.h"
#include "src/core/cuda_status.h"
#include "src/core/refusal.h"
#include "src/select/cuda/launch.h"
#include "src/select/mean_key.h"
#include "src/unite/cuda/launch.h"
#include "src/unite/cuda/step_layout.h"

namespace compact {
namespace {

constexpr Refusal kRefuse{"step (cuda)"};

constexpr std::uintptr_t kWorkspaceAlignment = 256;

Status check_step_pointers(const CudaStepInput& input) {
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("chunks", input.chunks, alignof(CudaChunk)));
  return kRefuse.check_pointer("page_tables", input.page_tables, alignof(std::int32_t));
}

Status check_workspace(const StepLayout& layout, const void* workspace, std::int64_t bytes) {
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("workspace", workspace, kWorkspaceAlignment));
  if (bytes >= layout.sizes.workspace_bytes) return {};
  return kRefuse.wrong("workspace_bytes is {}; at least {} (step_cuda_sizes)", bytes, layout.sizes.workspace_bytes);
}

Status check_16_bit(const char* name, DType dtype) {
  if (dtype == DType::kBF16 || dtype == DType::kF16) return {};
  return kRefuse.missing("{} is {}; kernels exist for bf16 (1), f16 (2)", name, static_cast<std::int32_t>(dtype));
}

// Major compute capability. Programmatic dependent launch is known from 9.0 on; the kernels need 8.0.
constexpr int kPdlMajor = 9;
Result<int> device_major() {
  int device = 0, major = 0;
  CA_RETURN_IF_ERROR(cuda_status(kRefuse.caller, cudaGetDevice(&device), "no current device"));
  CA_RETURN_IF_ERROR(cuda_status(
      kRefuse.caller, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device query"));
  if (major < 8) return kRefuse.missing("the device has compute capability {}.x; 8.0 or later", major);
  return major;
}

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

// The rule that the kernel knows.
Status check_rule(const MeanKeyOptions& options) {
  CA_RETURN_IF_ERROR(check_mean_key_options(options, {}));
  if (options.alpha >= 0)
    return kRefuse.missing("mean-key: alpha is {}; the kernel knows a share (alpha below 0)", options.alpha);
  if (options.tile != TileShape::kPacked)
    return kRefuse.missing("mean-key: tile per head; the kernel knows packed tiles");
  if (options.visible != PageVisibility::kFull) {
    return kRefuse.missing("mean-key: visibility {}; the kernel knows kFull (2)",
                           static_cast<std::int32_t>(options.visible));
  }
  if (options.norm != ScoreNorm::kRow) return kRefuse.missing("mean-key: tile norm; the kernel knows row norm");
  if (options.vote != RowVote::kMax) return kRefuse.missing("mean-key: vote mean; the kernel knows vote max");
  return {};
}

Status check_select(const CudaStepInput& input, const CudaMeanKeyInput& select) {
  if (select.head_dim != 64 && select.head_dim != 128 && select.head_dim != 256) {
    return kRefuse.missing("head dimension is {}; kernels exist for 64, 128, 256", select.head_dim);
  }
  CA_RETURN_IF_ERROR(check_16_bit("dtype", select.dtype));
  CA_RETURN_IF_ERROR(check_rule(select.options));
  if (!std::isfinite(select.softmax_scale) || select.softmax_scale <= 0) {
    return kRefuse.wrong("softmax_scale is {}; finite and positive", select.softmax_scale);
  }
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("q", select.q, 16));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("mean_k", select.mean_k, 16));
  const auto check_stride = [&](const char* name, std::int64_t stride, std::int32_t count) -> Status {
    if (count > 1 && stride < select.head_dim)
      return kRefuse.wrong("{} is {}; at least {}", name, stride, select.head_dim);
    if (stride % 8 != 0) return kRefuse.wrong("{} is {}; a multiple of 8 elements (16 bytes)", name, stride);
    return {};
  };
  CA_RETURN_IF_ERROR(check_stride("q_token_stride", select.q_token_stride, input.num_q_tokens));
  return check_stride("q_head_stride", select.q_head_stride, input.num_q_heads);
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
  CA_RETURN_IF_ERROR(check_step_pointers(input));
  if (layout.sizes.max_units > 0) {  // without query rows there are no units, but sums of every chunk
    CA_RETURN_IF_ERROR(kRefuse.check_pointer("lists.units", lists.units, alignof(AttentionUnit)));
    CA_RETURN_IF_ERROR(kRefuse.check_pointer("lists.page_ids", lists.page_ids, alignof(std::int32_t)));
  }
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("lists.stats", lists.stats, alignof(UnionStats)));
  CA_RETURN_IF_ERROR(check_workspace(layout, workspace, workspace_bytes));
  CA_ASSIGN_OR_RETURN(const int major, device_major());
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
  CA_RETURN_IF_ERROR(check_step_pointers(input));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("error", error, alignof(std::int32_t)));
  CA_RETURN_IF_ERROR(check_workspace(layout, workspace, workspace_bytes));
  CA_ASSIGN_OR_RETURN(const int major, device_major());
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
  CA_RETURN_IF_ERROR(check_step_pointers(input));
  CA_RETURN_IF_ERROR(check_select(input, select));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("mask", mask, alignof(std::uint64_t)));
  CA_RETURN_IF_ERROR(check_workspace(layout, workspace, workspace_bytes));
  CA_ASSIGN_OR_RETURN(const int major, device_major());
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
  CA_RETURN_IF_ERROR(check_16_bit("kv.dtype", kv.dtype));
  if (kv.page_tokens != input.page_tokens || kv.num_kv_heads != input.num_kv_heads || kv.num_pages != input.num_pages) {
    return kRefuse.wrong("the cache has {} pages of {} tokens and {} KV heads; the step {}, {}, {}", kv.num_pages,
                         kv.page_tokens, kv.num_kv_heads, input.num_pages, input.page_tokens, input.num_kv_heads);
  }
  if (kv.head_dim < 8 || kv.head_dim % 8 != 0) return kRefuse.wrong("kv.head_dim is {}; a multiple of 8", kv.head_dim);
  for (const std::int64_t stride : {kv.page_stride, kv.head_stride, kv.token_stride}) {
    if (stride % 8 != 0)
      return kRefuse.wrong("a stride of the cache is {}; a multiple of 8 elements (16 bytes)", stride);
  }
  const std::int32_t max_pages = layout.shape.list_capacity;
  if (input.num_chunks == 0 || max_pages == 0) return {};
  if (std::int64_t{input.num_chunks} * max_pages > 0x7fffffff) {
    return kRefuse.wrong("{} chunks of up to {} pages are too many for one call", input.num_chunks, max_pages);
  }
  CA_RETURN_IF_ERROR(check_step_pointers(input));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("kv.k", kv.k, 16));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("mean_k", mean_k, 16));
  CA_ASSIGN_OR_RETURN(const int major, device_major());
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
