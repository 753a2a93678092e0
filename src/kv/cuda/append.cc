// Host side of the append: checks, and the launches.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "src/core/cuda_status.h"
#include "src/core/refusal.h"
#include "src/kv/cuda/launch.h"

namespace compact {
namespace {

constexpr Refusal kRefuse{"append (cuda)"};

Status check_batch(const CudaStepInput& input) {
  if (input.num_chunks < 0) return kRefuse.wrong("num_chunks is {}; 0 or more", input.num_chunks);
  if (input.num_q_tokens < 0) return kRefuse.wrong("num_q_tokens is {}; 0 or more", input.num_q_tokens);
  if (input.num_chunks > 0) CA_RETURN_IF_ERROR(kRefuse.check_pointer("chunks", input.chunks, alignof(CudaChunk)));
  return {};
}

Status check_cache(const CudaStepInput& input, const PagedKvView& kv) {
  if (kv.head_dim != 64 && kv.head_dim != 128 && kv.head_dim != 256) {
    return kRefuse.missing("head dimension is {}; kernels exist for 64, 128, 256", kv.head_dim);
  }
  if (kv.dtype != DType::kBF16 && kv.dtype != DType::kF16) {
    return kRefuse.missing("kv.dtype is {}; kernels exist for bf16 (1), f16 (2)", static_cast<std::int32_t>(kv.dtype));
  }
  if (kv.page_tokens < 16 || kv.page_tokens > 256 || !std::has_single_bit(static_cast<std::uint32_t>(kv.page_tokens))) {
    return kRefuse.missing("kv.page_tokens is {}; a power of two from 16 to 256", kv.page_tokens);
  }
  if (kv.page_tokens != input.page_tokens || kv.num_kv_heads != input.num_kv_heads || kv.num_pages != input.num_pages) {
    return kRefuse.wrong("the cache has {} pages of {} tokens and {} KV heads; the step {}, {}, {}", kv.num_pages,
                         kv.page_tokens, kv.num_kv_heads, input.num_pages, input.page_tokens, input.num_kv_heads);
  }
  if (kv.num_pages < 1 || kv.num_kv_heads < 1) {
    return kRefuse.wrong("the cache has {} pages and {} KV heads; at least 1 of each", kv.num_pages, kv.num_kv_heads);
  }
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("kv.k", kv.k, 16));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("kv.v", kv.v, 16));
  CA_RETURN_IF_ERROR(kRefuse.check_stride("kv.page_stride", kv.page_stride, kv.num_pages, kv.head_dim));
  CA_RETURN_IF_ERROR(kRefuse.check_stride("kv.head_stride", kv.head_stride, kv.num_kv_heads, kv.head_dim));
  return kRefuse.check_stride("kv.token_stride", kv.token_stride, kv.page_tokens, kv.head_dim);
}

Status check_rows(const CudaStepInput& input, const CudaAppendInput& append, std::int32_t head_dim) {
  const std::int32_t tokens = input.num_q_tokens;
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("k", append.k, 16));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("v", append.v, 16));
  CA_RETURN_IF_ERROR(kRefuse.check_stride("k_token_stride", append.k_token_stride, tokens, head_dim));
  CA_RETURN_IF_ERROR(kRefuse.check_stride("k_head_stride", append.k_head_stride, input.num_kv_heads, head_dim));
  CA_RETURN_IF_ERROR(kRefuse.check_stride("v_token_stride", append.v_token_stride, tokens, head_dim));
  CA_RETURN_IF_ERROR(kRefuse.check_stride("v_head_stride", append.v_head_stride, input.num_kv_heads, head_dim));
  if (append.q != nullptr) {
    if (input.num_q_heads < 1) return kRefuse.wrong("num_q_heads is {} with q; at least 1", input.num_q_heads);
    CA_RETURN_IF_ERROR(kRefuse.check_pointer("q", append.q, 16));
    CA_RETURN_IF_ERROR(kRefuse.check_stride("q_token_stride", append.q_token_stride, tokens, head_dim));
    CA_RETURN_IF_ERROR(kRefuse.check_stride("q_head_stride", append.q_head_stride, input.num_q_heads, head_dim));
  }
  if (append.rope_table != nullptr) CA_RETURN_IF_ERROR(kRefuse.check_pointer("rope_table", append.rope_table, 16));
  if ((append.q_norm != nullptr || append.k_norm != nullptr) &&
      !(std::isfinite(append.norm_eps) && append.norm_eps >= 0)) {
    return kRefuse.wrong("norm_eps is {}; finite, 0 or more", append.norm_eps);
  }
  return {};
}

// Programmatic dependent launch is known from 9.0 on; the kernels need 8.0.
Result<bool> dependent_launch() {
  int device = 0, major = 0;
  CA_RETURN_IF_ERROR(cuda_status(kRefuse.caller, cudaGetDevice(&device), "no current device"));
  CA_RETURN_IF_ERROR(cuda_status(
      kRefuse.caller, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device query"));
  if (major < 8) return kRefuse.missing("the device has compute capability {}.x; 8.0 or later", major);
  return major >= 9;
}

// Every chunk may begin and end inside a page, and no page is touched without a token.
std::int64_t most_touched_pages(const CudaStepInput& input) {
  return std::min<std::int64_t>(input.num_q_tokens,
                                input.num_q_tokens / input.page_tokens + 2 * std::int64_t{input.num_chunks});
}

}  // namespace

Status rope_table_cuda(const CudaStepInput& input, const float* inverse_frequencies, std::int32_t head_dim,
                       float* table, void* stream) {
  CA_RETURN_IF_ERROR(check_batch(input));
  if (head_dim < 2 || head_dim % 2 != 0) return kRefuse.wrong("head_dim is {}; even, at least 2", head_dim);
  if (input.num_q_tokens == 0) return {};
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("inverse_frequencies", inverse_frequencies, alignof(float)));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("table", table, 16));
  CA_ASSIGN_OR_RETURN(const bool pdl, dependent_launch());
  const RopeTableArgs args{.chunks = input.chunks,
                           .num_chunks = input.num_chunks,
                           .num_q_tokens = input.num_q_tokens,
                           .half_dim = head_dim / 2,
                           .inverse_frequencies = inverse_frequencies,
                           .table = reinterpret_cast<float2*>(table)};
  return cuda_status(kRefuse.caller, launch_rope_table(args, pdl, static_cast<cudaStream_t>(stream)),
                     "launch of the rope kernel");
}

Status append_cuda(const CudaStepInput& input, const CudaAppendInput& append, const PagedKvView& kv, void* mean_k,
                   std::int32_t* mean_tokens, void* stream) {
  CA_RETURN_IF_ERROR(check_batch(input));
  CA_RETURN_IF_ERROR(check_cache(input, kv));
  if (input.num_chunks == 0 || input.num_q_tokens == 0) return {};
  CA_RETURN_IF_ERROR(check_rows(input, append, kv.head_dim));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("page_tables", input.page_tables, alignof(std::int32_t)));
  if (mean_k != nullptr) CA_RETURN_IF_ERROR(kRefuse.check_pointer("mean_k", mean_k, 16));
  const std::int64_t pages = most_touched_pages(input);
  const std::int64_t ctas =
      2 * pages * kv.num_kv_heads + std::int64_t{input.num_q_tokens} * std::max(1, input.num_q_heads);
  if (ctas > 0x7fffffff) {
    return kRefuse.wrong("{} tokens of {} heads are too many for one call", input.num_q_tokens, input.num_q_heads);
  }
  CA_ASSIGN_OR_RETURN(const bool pdl, dependent_launch());
  const AppendArgs args{.chunks = input.chunks,
                        .page_tables = input.page_tables,
                        .page_table_stride = input.page_table_stride,
                        .num_table_rows = input.num_table_rows,
                        .num_chunks = input.num_chunks,
                        .num_q_tokens = input.num_q_tokens,
                        .max_context_tokens = input.max_context_tokens,
                        .num_q_heads = append.q == nullptr ? 0 : input.num_q_heads,
                        .in = append,
                        .kv = kv,
                        .mean_k = static_cast<std::uint16_t*>(mean_k),
                        .mean_tokens = mean_tokens,
                        .max_pages = static_cast<std::int32_t>(pages)};
  return cuda_status(kRefuse.caller, launch_append(args, pdl, static_cast<cudaStream_t>(stream)),
                     "launch of the append kernel");
}

}  // namespace compact
