#include "compact/attention_cuda.h"

namespace compact {

const char* cuda_attention_error_text(CudaAttentionError error) noexcept {
  switch (error) {
    case CudaAttentionError::kNone: return "no error";
    case CudaAttentionError::kTooManyUnits: return "num_units on the device is outside [0, max_units]";
    case CudaAttentionError::kTooManyMTiles: return "units share query rows or reach past num_q_tokens";
    case CudaAttentionError::kTooManySlots: return "a list is longer than max_list_tokens under fixed_split_tokens";
    case CudaAttentionError::kBadUnit: return "a field of a unit is out of range";
    case CudaAttentionError::kBadPageId: return "a page id is outside the cache";
  }
  return "unknown error";
}

}  // namespace compact
