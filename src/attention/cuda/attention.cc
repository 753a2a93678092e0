// Host side of attention on a GPU: checks, the choice of a kernel, and the chain prepare -> main -> combine.
#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <numbers>

#include "compact/attention_cuda.h"
#include "src/attention/cuda/plan.h"
#include "src/attention/sm80/launch.h"
#include "src/attention/sm90/launch.h"
#include "src/attention/sm90/sm90_config.h"
#include "src/core/count_bits.h"
#include "src/core/cuda_status.h"
#include "src/core/refusal.h"

namespace compact {
namespace {

constexpr Refusal kRefuse{"attention (cuda)"};

constexpr std::int32_t kSplitGranule = 128;  // a multiple of every BN in use
constexpr std::int64_t kWorkspaceAlignment = 256;

Status check_sizes(const CudaAttentionInput& input, const CudaAttentionOptions& options) {
  const PagedKvView& kv = input.kv;
  if (sm80_tile(kv.head_dim).rows == 0)
    return kRefuse.missing("head dimension is {}; kernels exist for 64, 128, 256", kv.head_dim);
  if (kv.dtype != DType::kBF16 && kv.dtype != DType::kF16) {
    return kRefuse.missing("kv.dtype is {}; kernels exist for bf16 (1), f16 (2)", static_cast<std::int32_t>(kv.dtype));
  }
  if (kv.page_tokens < 16 || kv.page_tokens > 256 || !std::has_single_bit(static_cast<std::uint32_t>(kv.page_tokens))) {
    return kRefuse.missing("kv.page_tokens is {}; a power of two from 16 to 256", kv.page_tokens);
  }
  if (kv.num_pages < 1) return kRefuse.wrong("kv.num_pages is {}; at least 1", kv.num_pages);
  if (kv.num_kv_heads < 1) return kRefuse.wrong("kv.num_kv_heads is {}; at least 1", kv.num_kv_heads);
  if (input.num_q_heads < 1 || input.num_q_heads % kv.num_kv_heads != 0) {
    return kRefuse.wrong("num_q_heads is {}; a multiple of kv.num_kv_heads = {}", input.num_q_heads, kv.num_kv_heads);
  }
  const std::int32_t group = input.num_q_heads / kv.num_kv_heads;
  if (input.heads_per_unit < 1 || group % input.heads_per_unit != 0) {
    return kRefuse.wrong("heads_per_unit is {}; a divisor of num_q_heads / kv.num_kv_heads = {}", input.heads_per_unit,
                         group);
  }
  if (input.num_q_tokens < 0) return kRefuse.wrong("num_q_tokens is {}; at least 0", input.num_q_tokens);
  if (input.max_units < 0) return kRefuse.wrong("max_units is {}; at least 0", input.max_units);
  if (options.fixed_split_tokens < 0 || options.fixed_split_tokens % kSplitGranule != 0) {
    return kRefuse.wrong("fixed_split_tokens is {}; 0 or a multiple of {}", options.fixed_split_tokens, kSplitGranule);
  }
  if (options.fixed_split_tokens > 0 && options.max_list_tokens < 1) {
    return kRefuse.wrong("max_list_tokens is {} with fixed_split_tokens {}; the longest list", options.max_list_tokens,
                         options.fixed_split_tokens);
  }
  return {};
}

Status check_tensors(const CudaAttentionInput& input, const CudaAttentionOutput& output) {
  const PagedKvView& kv = input.kv;
  const std::int32_t d = kv.head_dim;
  if (!std::isfinite(input.softmax_scale) || input.softmax_scale <= 0) {
    return kRefuse.wrong("softmax_scale is {}; finite and positive", input.softmax_scale);
  }
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("q", input.q, 16));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("o", output.o, 16));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("kv.k", kv.k, 16));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("kv.v", kv.v, 16));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("units", input.units, alignof(AttentionUnit)));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("page_ids", input.page_ids, sizeof(std::int32_t)));
  CA_RETURN_IF_ERROR(kRefuse.check_stride("q_token_stride", input.q_token_stride, input.num_q_tokens, d));
  CA_RETURN_IF_ERROR(kRefuse.check_stride("q_head_stride", input.q_head_stride, input.num_q_heads, d));
  CA_RETURN_IF_ERROR(kRefuse.check_stride("o_token_stride", output.o_token_stride, input.num_q_tokens, d));
  CA_RETURN_IF_ERROR(kRefuse.check_stride("o_head_stride", output.o_head_stride, input.num_q_heads, d));
  CA_RETURN_IF_ERROR(kRefuse.check_stride("kv.page_stride", kv.page_stride, kv.num_pages, d));
  CA_RETURN_IF_ERROR(kRefuse.check_stride("kv.head_stride", kv.head_stride, kv.num_kv_heads, d));
  CA_RETURN_IF_ERROR(kRefuse.check_stride("kv.token_stride", kv.token_stride, kv.page_tokens, d));
  return {};
}

}  // namespace

Result<CudaDevice> current_cuda_device() {
  int device = 0, sms = 0, major = 0, minor = 0;
  const auto query = [&](int& value, cudaDeviceAttr attribute) {
    return cuda_status(kRefuse.caller, cudaDeviceGetAttribute(&value, attribute, device), "device query");
  };
  CA_RETURN_IF_ERROR(cuda_status(kRefuse.caller, cudaGetDevice(&device), "no current device"));
  CA_RETURN_IF_ERROR(query(sms, cudaDevAttrMultiProcessorCount));
  CA_RETURN_IF_ERROR(query(major, cudaDevAttrComputeCapabilityMajor));
  CA_RETURN_IF_ERROR(query(minor, cudaDevAttrComputeCapabilityMinor));
  if (major < 8) return kRefuse.missing("the device has compute capability {}.{}; 8.0 or later", major, minor);
  return CudaDevice{10 * major + minor, sms, major == 9 ? CudaBackend::kSm90 : CudaBackend::kSm80};
}

Result<CudaPlan> plan_attention(const CudaAttentionInput& input, const CudaAttentionOptions& options) {
  CA_RETURN_IF_ERROR(check_sizes(input, options));
  CA_ASSIGN_OR_RETURN(const CudaDevice device, current_cuda_device());
  CudaPlan plan;
  plan.num_sms = device.num_sms;
  plan.pdl = device.capability >= 90;
  const bool hopper = device.backend == CudaBackend::kSm90;
  switch (options.backend) {
    case CudaBackend::kAuto: plan.backend = device.backend; break;
    case CudaBackend::kSm80: plan.backend = CudaBackend::kSm80; break;
    case CudaBackend::kSm90:
      if (!hopper) {
        return kRefuse.missing("backend sm90 on compute capability {}.{}; 9.0", device.capability / 10,
                               device.capability % 10);
      }
      plan.backend = CudaBackend::kSm90;
      break;
    default:
      return kRefuse.wrong("backend is {}; auto (0), sm90 (1), sm80 (2)", static_cast<std::int32_t>(options.backend));
  }

  if (plan.backend == CudaBackend::kSm90) {
    const Sm90Tile tile = sm90_tile(input.kv.head_dim);
    CA_RETURN_IF_ERROR(plan_tile(plan, input, options, tile.rows, tile.tokens, device.num_sms));
  } else {
    const Sm80Tile tile = sm80_tile(input.kv.head_dim);
    std::int32_t ctas_per_sm = 0;
    CA_RETURN_IF_ERROR(cuda_status(kRefuse.caller, sm80_ctas_per_sm(input.kv.dtype, input.kv.head_dim, &ctas_per_sm),
                                   "occupancy of the sm80 kernel"));
    if (ctas_per_sm < 1) {
      return kRefuse.missing("the device has too little shared memory for head dimension {}", input.kv.head_dim);
    }
    CA_RETURN_IF_ERROR(plan_tile(plan, input, options, tile.rows, tile.tokens, ctas_per_sm * device.num_sms));
  }
  return plan;
}

Status plan_tile(CudaPlan& plan, const CudaAttentionInput& input, const CudaAttentionOptions& options,
                 std::int32_t tile_rows, std::int32_t tile_tokens, std::int32_t num_workers) {
  plan.schedule = {.tile_rows = tile_rows,
                   .tile_tokens = tile_tokens,
                   .heads_per_unit = input.heads_per_unit,
                   .heads_per_tile = heads_per_tile(input.heads_per_unit),
                   .num_workers = num_workers,
                   .fixed_split_tiles = options.fixed_split_tokens / tile_tokens};
  constexpr std::int64_t kMaxItems = std::numeric_limits<std::int32_t>::max() / 4;
  const std::int64_t m_tiles = max_m_tiles(plan.schedule, input.max_units, input.num_q_tokens, input.num_q_heads);
  if (m_tiles > kMaxItems) {
    return kRefuse.wrong("{} query tokens of {} heads in {} units are too many for one call", input.num_q_tokens,
                         input.num_q_heads, input.max_units);
  }
  std::int64_t slots = max_load_slots(num_workers);
  if (options.fixed_split_tokens > 0) {
    const std::int32_t pieces = ceil_div(options.max_list_tokens, options.fixed_split_tokens);
    slots = pieces == 1 ? 0 : m_tiles * pieces;
  }
  if (m_tiles + slots > kMaxItems) {
    return kRefuse.wrong("fixed_split_tokens is {}: {} tiles of {} query rows in {} pieces are too many for one call",
                         options.fixed_split_tokens, m_tiles, tile_rows, slots);
  }
  plan.max_m_tiles = static_cast<std::int32_t>(m_tiles);
  plan.max_slots = static_cast<std::int32_t>(slots);
  plan.workspace = plan_workspace(input.max_units, m_tiles, slots, tile_rows, input.kv.head_dim);
  return {};
}

CudaChain make_chain(const CudaPlan& plan, const CudaAttentionInput& input, const CudaAttentionOutput& output,
                     const CudaAttentionOptions& options, void* workspace) {
  const auto at = [workspace](std::int64_t offset) { return static_cast<char*>(workspace) + offset; };
  const Workspace& w = plan.workspace;
  const PagedKvView& kv = input.kv;
  auto* header = reinterpret_cast<WorkHeader*>(at(w.header));
  CudaChain chain;
  chain.prepare = {.schedule = plan.schedule,
                   .units = input.units,
                   .num_units = input.num_units,
                   .max_units = input.max_units,
                   .max_m_tiles = plan.max_m_tiles,
                   .max_slots = plan.max_slots,
                   .header = header,
                   .items = reinterpret_cast<WorkItem*>(at(w.items)),
                   .slots = reinterpret_cast<SlotItem*>(at(w.slots)),
                   .m_begin = reinterpret_cast<std::int32_t*>(at(w.m_begin)),
                   .step_begin = reinterpret_cast<std::int32_t*>(at(w.step_begin)),
                   .slot_begin = reinterpret_cast<std::int32_t*>(at(w.slot_begin)),
                   .tiles = reinterpret_cast<std::int32_t*>(at(w.tiles)),
                   .error = output.error,
                   .checked = options.check_lists};
  chain.main = {.output = {.o = static_cast<std::uint16_t*>(output.o),
                           .o_token_stride = output.o_token_stride,
                           .o_head_stride = output.o_head_stride,
                           .lse = output.lse,
                           .partial_o = reinterpret_cast<float*>(at(w.partial_o)),
                           .partial_m_l = reinterpret_cast<float*>(at(w.partial_m_l)),
                           .num_q_heads = input.num_q_heads,
                           .heads_per_tile_log2 = log2_exact(plan.schedule.heads_per_tile)},
                .q = input.q,
                .q_token_stride = input.q_token_stride,
                .q_head_stride = input.q_head_stride,
                .k = kv.k,
                .v = kv.v,
                .kv_page_stride = kv.page_stride,
                .kv_head_stride = kv.head_stride,
                .kv_token_stride = kv.token_stride,
                .page_ids = input.page_ids,
                .work = chain.prepare.items,
                .num_items = &header->num_items,
                .work_counter = &header->next_item,
                .dtype = kv.dtype,
                .head_dim = kv.head_dim,
                .num_pages = kv.num_pages,
                .num_kv_heads = kv.num_kv_heads,
                .page_tokens_log2 = log2_exact(kv.page_tokens),
                .num_q_tokens = input.num_q_tokens,
                .num_workers = plan.schedule.num_workers,
                .scale_log2 = static_cast<float>(input.softmax_scale * std::numbers::log2e)};
  chain.combine = {.header = header,
                   .slots = chain.prepare.slots,
                   .output = chain.main.output,
                   .dtype = kv.dtype,
                   .head_dim = kv.head_dim,
                   .tile_rows = plan.schedule.tile_rows};
  return chain;
}

Status launch_chain_prepare(const CudaPlan& plan, const CudaChain& chain, cudaStream_t stream) {
  return cuda_status(kRefuse.caller, launch_prepare(chain.prepare, plan.pdl, stream), "launch of the prepare kernel");
}

Status launch_chain_main(const CudaPlan& plan, const CudaChain& chain, cudaStream_t stream) {
  if (plan.backend == CudaBackend::kSm90) return sm90_launch_prefill(chain.main, stream);
  return cuda_status(kRefuse.caller, sm80_launch_prefill(chain.main, plan.pdl, stream), "launch of the sm80 kernel");
}

Status launch_chain_combine(const CudaPlan& plan, const CudaChain& chain, cudaStream_t stream) {
  if (plan.max_slots == 0) return {};
  return cuda_status(kRefuse.caller, launch_combine(chain.combine, plan.num_sms, plan.pdl, stream),
                     "launch of the combine kernel");
}

Result<std::int64_t> attend_cuda_workspace_bytes(const CudaAttentionInput& input, const CudaAttentionOptions& options) {
  CA_ASSIGN_OR_RETURN(const CudaPlan plan, plan_attention(input, options));
  return plan.workspace.bytes;
}

Status attend_cuda(const CudaAttentionInput& input, const CudaAttentionOutput& output,
                   const CudaAttentionOptions& options, void* workspace, std::int64_t workspace_bytes, void* stream) {
  CA_ASSIGN_OR_RETURN(const CudaPlan plan, plan_attention(input, options));
  if (input.max_units == 0 || input.num_q_tokens == 0) return {};
  CA_RETURN_IF_ERROR(check_tensors(input, output));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("workspace", workspace, kWorkspaceAlignment));
  if (workspace_bytes < plan.workspace.bytes) {
    return kRefuse.wrong("workspace_bytes is {}; at least {} (attend_cuda_workspace_bytes)", workspace_bytes,
                         plan.workspace.bytes);
  }
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (options.check_lists) {
    if (output.error == nullptr) return kRefuse.wrong("check_lists without output.error; where to report");
    const CheckArgs check{.units = input.units,
                          .num_units = input.num_units,
                          .page_ids = input.page_ids,
                          .max_units = input.max_units,
                          .num_q_tokens = input.num_q_tokens,
                          .num_q_heads = input.num_q_heads,
                          .num_kv_heads = input.kv.num_kv_heads,
                          .heads_per_unit = input.heads_per_unit,
                          .page_tokens = input.kv.page_tokens,
                          .num_pages = input.kv.num_pages,
                          .error = output.error};
    CA_RETURN_IF_ERROR(cuda_status(kRefuse.caller, launch_check_lists(check, cuda_stream), "launch of the list check"));
  }
  const CudaChain chain = make_chain(plan, input, output, options, workspace);
  CA_RETURN_IF_ERROR(launch_chain_prepare(plan, chain, cuda_stream));
  CA_RETURN_IF_ERROR(launch_chain_main(plan, chain, cuda_stream));
  return launch_chain_combine(plan, chain, cuda_stream);
}

}  // namespace compact
