#include "compact/step_cuda.h"

namespace compact {

const char* cuda_step_error_text(CudaStepError error) noexcept {
  switch (error) {
    case CudaStepError::kNone: return "no error";
    case CudaStepError::kBadChunk: return "a chunk's rows, positions or table row are out of bounds";
    case CudaStepError::kTooManyRows: return "chunks share query rows: more query blocks or spans than rows can have";
    case CudaStepError::kBadPageId: return "a page table entry is outside the cache";
    case CudaStepError::kStaleMean: return "the mean of a past page does not cover the whole page";
  }
  return "unknown error";
}

}  // namespace compact
