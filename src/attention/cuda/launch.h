// Host launch functions of the kernels around the main one. `stream` is a cudaStream_t; the result is a cudaError_t.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "compact/tensor_view.h"
#include "src/attention/cuda/prefill_params.h"
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
  PrefillOutput output;
  DType dtype = DType::kBF16;
  std::int32_t head_dim = 0;
  std::int32_t tile_rows = 0;
};
cudaError_t launch_combine(const CombineArgs& args, std::int32_t num_sms, bool pdl, cudaStream_t stream);

}  // namespace compact
