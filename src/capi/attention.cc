// Attention over page lists: C structs to the C++ views, nothing else.
#include "compact/attention.h"

#include <cstddef>
#include <span>

#include "compact/attention_cuda.h"
#include "src/capi/call.h"
#include "src/capi/thread_pool.h"

namespace compact::capi {
namespace {

// The same bytes on both sides.
static_assert(sizeof(ca_attention_unit) == sizeof(AttentionUnit));
static_assert(offsetof(ca_attention_unit, q_begin) == offsetof(AttentionUnit, q_begin));
static_assert(offsetof(ca_attention_unit, q_len) == offsetof(AttentionUnit, q_len));
static_assert(offsetof(ca_attention_unit, q_head) == offsetof(AttentionUnit, q_head));
static_assert(offsetof(ca_attention_unit, kv_head) == offsetof(AttentionUnit, kv_head));
static_assert(offsetof(ca_attention_unit, list_begin) == offsetof(AttentionUnit, list_begin));
static_assert(offsetof(ca_attention_unit, list_tokens) == offsetof(AttentionUnit, list_tokens));
static_assert(offsetof(ca_attention_unit, past_tokens) == offsetof(AttentionUnit, past_tokens));
static_assert(offsetof(ca_attention_unit, causal_shift) == offsetof(AttentionUnit, causal_shift));
static_assert(CA_DTYPE_F32 == static_cast<int>(DType::kF32));
static_assert(CA_DTYPE_BF16 == static_cast<int>(DType::kBF16));
static_assert(CA_DTYPE_F16 == static_cast<int>(DType::kF16));
static_assert(sizeof(ca_attention) == 160 && sizeof(ca_cuda_options) == 40, "version 1");

const AttentionUnit* units_of(const ca_attention& a) { return reinterpret_cast<const AttentionUnit*>(a.units); }

PagedKvView kv_of(const ca_attention& a) {
  return {.k = a.k,
          .v = a.v,
          .dtype = static_cast<DType>(a.kv_dtype),
          .num_pages = a.num_pages,
          .num_kv_heads = a.num_kv_heads,
          .page_tokens = a.page_tokens,
          .head_dim = a.head_dim,
          .page_stride = a.kv_page_stride,
          .head_stride = a.kv_head_stride,
          .token_stride = a.kv_token_stride};
}

// A span of a count that the caller gave.
template <class T>
Status checked_span(const char* name, const T* data, std::int32_t count, std::span<const T>& span) {
  if (count < 0) return invalid_argument(std::string("num_") + name + " is " + std::to_string(count) + "; at least 0");
  if (count > 0 && data == nullptr) {
    return invalid_argument(std::string(name) + " is null and num_" + name + " is " + std::to_string(count));
  }
  span = {data, static_cast<std::size_t>(count)};
  return {};
}

Status run_cpu(const ca_attention& a, ThreadPool& pool) {
  AttentionInput input{.q = {static_cast<const float*>(a.q), a.num_q_tokens, a.num_q_heads, a.head_dim,
                             a.q_token_stride, a.q_head_stride},
                       .kv = kv_of(a),
                       .units = {},
                       .page_ids = {},
                       .heads_per_unit = a.heads_per_unit,
                       .softmax_scale = a.softmax_scale};
  CA_RETURN_IF_ERROR(checked_span("units", units_of(a), a.num_units, input.units));
  CA_RETURN_IF_ERROR(checked_span("page_ids", a.page_ids, a.num_page_ids, input.page_ids));
  const AttentionOutput output{
      .o = {static_cast<float*>(a.o), a.num_q_tokens, a.num_q_heads, a.head_dim, a.o_token_stride, a.o_head_stride},
      .lse = a.lse};
  return attend_cpu(input, output, pool);
}

struct CudaCall {
  CudaAttentionInput input;
  CudaAttentionOutput output;
  CudaAttentionOptions options;
};

Status read_cuda_call(const ca_attention* attention, const ca_cuda_options* options, CudaCall& call) {
  ca_attention a;
  CA_RETURN_IF_ERROR(read_struct("attention", attention, sizeof(ca_attention), a));
  ca_cuda_options opt{};
  if (options != nullptr) CA_RETURN_IF_ERROR(read_struct("options", options, sizeof(ca_cuda_options), opt));
  call.input = {.q = a.q,
                .q_token_stride = a.q_token_stride,
                .q_head_stride = a.q_head_stride,
                .num_q_tokens = a.num_q_tokens,
                .num_q_heads = a.num_q_heads,
                .kv = kv_of(a),
                .units = units_of(a),
                .num_units = opt.num_units,
                .page_ids = a.page_ids,
                .max_units = a.num_units,
                .heads_per_unit = a.heads_per_unit,
                .softmax_scale = a.softmax_scale};
  call.output = {.o = a.o,
                 .o_token_stride = a.o_token_stride,
                 .o_head_stride = a.o_head_stride,
                 .lse = a.lse,
                 .error = opt.device_error};
  call.options = {.backend = static_cast<CudaBackend>(opt.backend),
                  .fixed_split_tokens = opt.fixed_split_tokens,
                  .max_list_tokens = opt.max_list_tokens,
                  .check_lists = opt.check_lists != 0};
  return {};
}

}  // namespace
}  // namespace compact::capi

using namespace compact;

ca_status ca_attention_run_cpu(const ca_attention* attention, ca_thread_pool* pool) {
  return capi::call([&]() -> Status {
    ca_attention a;
    CA_RETURN_IF_ERROR(capi::read_struct("attention", attention, sizeof(ca_attention), a));
    if (pool == nullptr) return invalid_argument("pool is null");
    return capi::run_cpu(a, pool->pool);
  });
}

const char* ca_cuda_device_error_text(int32_t device_error) {
  return cuda_attention_error_text(static_cast<CudaAttentionError>(device_error));
}

ca_status ca_attention_cuda_workspace(const ca_attention* attention, const ca_cuda_options* options, int64_t* bytes) {
  return capi::call([&]() -> Status {
    if (bytes == nullptr) return invalid_argument("bytes is null");
    capi::CudaCall call;
    CA_RETURN_IF_ERROR(capi::read_cuda_call(attention, options, call));
    CA_ASSIGN_OR_RETURN(*bytes, attend_cuda_workspace_bytes(call.input, call.options));
    return {};
  });
}

ca_status ca_attention_run_cuda(const ca_attention* attention, const ca_cuda_options* options, void* workspace,
                                int64_t workspace_bytes, void* stream) {
  return capi::call([&]() -> Status {
    capi::CudaCall call;
    CA_RETURN_IF_ERROR(capi::read_cuda_call(attention, options, call));
    return attend_cuda(call.input, call.output, call.options, workspace, workspace_bytes, stream);
  });
}
