// What entry points of the step on the device check alike.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>

#include "src/core/cuda_status.h"
#include "src/core/refusal.h"
#include "src/unite/cuda/step_layout.h"

namespace compact {

inline constexpr std::uintptr_t kWorkspaceAlignment = 256;
inline constexpr int kPdlMajor = 9;  // compute capability from which programmatic dependent launch is known

inline Status check_step_pointers(const Refusal& refuse, const CudaStepInput& input) {
  CA_RETURN_IF_ERROR(refuse.check_pointer("chunks", input.chunks, alignof(CudaChunk)));
  return refuse.check_pointer("page_tables", input.page_tables, alignof(std::int32_t));
}

inline Status check_workspace(const Refusal& refuse, const StepLayout& layout, const void* workspace,
                              std::int64_t bytes) {
  CA_RETURN_IF_ERROR(refuse.check_pointer("workspace", workspace, kWorkspaceAlignment));
  if (bytes >= layout.sizes.workspace_bytes) return {};
  return refuse.wrong("workspace_bytes is {}; at least {} (step_cuda_sizes)", bytes, layout.sizes.workspace_bytes);
}

inline Status check_16_bit(const Refusal& refuse, const char* name, DType dtype) {
  if (dtype == DType::kBF16 || dtype == DType::kF16) return {};
  return refuse.missing("{} is {}; kernels exist for bf16 (1), f16 (2)", name, static_cast<std::int32_t>(dtype));
}

// The queries of a layer as a selection reads them.
struct QueryRows {
  const void* q = nullptr;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;
  DType dtype = DType::kBF16;
  std::int32_t head_dim = 0;
  float softmax_scale = 0;
};

inline Status check_query_shape(const Refusal& refuse, const QueryRows& rows) {
  if (rows.head_dim != 64 && rows.head_dim != 128 && rows.head_dim != 256) {
    return refuse.missing("head dimension is {}; kernels exist for 64, 128, 256", rows.head_dim);
  }
  return check_16_bit(refuse, "dtype", rows.dtype);
}

inline Status check_queries(const Refusal& refuse, const CudaStepInput& input, const QueryRows& rows) {
  CA_RETURN_IF_ERROR(check_query_shape(refuse, rows));
  if (!std::isfinite(rows.softmax_scale) || rows.softmax_scale <= 0) {
    return refuse.wrong("softmax_scale is {}; finite and positive", rows.softmax_scale);
  }
  CA_RETURN_IF_ERROR(refuse.check_pointer("q", rows.q, 16));
  CA_RETURN_IF_ERROR(refuse.check_stride("q_token_stride", rows.token_stride, input.num_q_tokens, rows.head_dim));
  return refuse.check_stride("q_head_stride", rows.head_stride, input.num_q_heads, rows.head_dim);
}

// Pages of a layer against the step; looks at no pointer.
inline Status check_cache(const Refusal& refuse, const CudaStepInput& input, const PagedKvView& kv) {
  CA_RETURN_IF_ERROR(check_16_bit(refuse, "kv.dtype", kv.dtype));
  if (kv.page_tokens != input.page_tokens || kv.num_kv_heads != input.num_kv_heads || kv.num_pages != input.num_pages) {
    return refuse.wrong("the cache has {} pages of {} tokens and {} KV heads; the step {}, {}, {}", kv.num_pages,
                        kv.page_tokens, kv.num_kv_heads, input.num_pages, input.page_tokens, input.num_kv_heads);
  }
  if (kv.head_dim < 8 || kv.head_dim % 8 != 0) return refuse.wrong("kv.head_dim is {}; a multiple of 8", kv.head_dim);
  for (const std::int64_t stride : {kv.page_stride, kv.head_stride, kv.token_stride}) {
    if (stride % 8 != 0)
      return refuse.wrong("a stride of the cache is {}; a multiple of 8 elements (16 bytes)", stride);
  }
  return {};
}

// Major compute capability; the kernels need 8.0.
inline Result<int> device_major(const Refusal& refuse) {
  int device = 0, major = 0;
  CA_RETURN_IF_ERROR(cuda_status(refuse.caller, cudaGetDevice(&device), "no current device"));
  CA_RETURN_IF_ERROR(cuda_status(
      refuse.caller, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device query"));
  if (major < 8) return refuse.missing("the device has compute capability {}.x; 8.0 or later", major);
  return major;
}

}  // namespace compact
