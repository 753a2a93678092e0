// Host launch functions of the kernels around the main one. `stream` is a cudaStream_t; the result is a cudaError_t.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "compact/tensor_view.h"
#include "src/attention/prepare.h"

namespace compact {

cudaError_t launch_prepare(const PrepareArgs& args, bool pdl, cudaStream_t stream);

// Debug check of what lies on the device: fields of units and page ids. Writes the first error to `error`.
struct CheckArgs {
  const AttentionUnit* units = nullptr;  // [max_units]
  const std::int32_t* num_units = nullptr;
  const std::int32_t* page_ids = nullptr;
  std::int32_t max_units = 0;
  std::int32_t num_q_tokens = 0;
  std::int32_t num_q_heads = 0;
  std::int32_t num_kv_heads = 0;
  std::int32_t heads_per_unit = 0;
  std::int32_t page_tokens = 0;
  std::int32_t num_pages = 0;
  std::int32_t* error = nullptr;
};
cudaError_t launch_check_lists(const CheckArgs& args, cudaStream_t stream);

struct CombineArgs {
  const WorkHeader* header = nullptr;
  const SlotItem* slots = nullptr;
  const float* partial_o = nullptr;    // [slots, BM, D] unnormalised
  const float* partial_m_l = nullptr;  // [slots, BM, 2] row maximum in log2 units (-inf: saw nothing), row sum
  void* o = nullptr;                   // [T, Hq, D]
  float* lse = nullptr;                // [T, Hq] or null
  std::int64_t o_token_stride = 0;
  std::int64_t o_head_stride = 0;
  std::int32_t num_q_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t tile_rows = 0;
  std::int32_t heads_per_tile = 0;
  DType dtype = DType::kBF16;
};
cudaError_t launch_combine(const CombineArgs& args, std::int32_t num_sms, bool pdl, cudaStream_t stream);

// cudaLaunchKernelEx with the attribute that lets the kernel start before its predecessor has ended.
template <class... Params, class... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), std::int32_t grid, std::int32_t block, std::int32_t smem_bytes,
                          bool pdl, cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = static_cast<std::size_t>(smem_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = pdl ? 1 : 0;
  void* values[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), values);
}

}  // namespace compact
