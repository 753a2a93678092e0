/// One layer of a step on an NVIDIA GPU in one call: selection, union, lists, attention, one after the other on a
/// stream and without the host. The parts: step_cuda.h, select_cuda.h, attention_cuda.h.
///
///   plan_step_cuda       once per step, into the same workspace
///   run_step_cuda        per layer
///
/// Calls neither synchronise nor allocate, and can be captured in a CUDA graph: chunks, lengths and page tables are
/// read from the device at every replay, so that one graph serves every step of the same bounds.
#pragma once

#include <cstdint>

#include "compact/attention_cuda.h"
#include "compact/select_cuda.h"
#include "compact/step_cuda.h"

namespace compact {

/// All pointers are device pointers.
struct CudaStepLayer {
  CudaSelectInput select;      // its q, scale, dtype and head dimension are attention's too; its kv is not read
  PagedKvView kv;              // of the layer, the chunk's keys and values included
  CudaAttentionOutput output;  // rows of no chunk are left alone
  CudaAttentionOptions attention{};
  /// All pages for every chunk, without selection (kRequested): options and summaries of `select` are not read. The
  /// selector `dense` does the same.
  bool dense = false;
  UnionStats* stats = nullptr;              // [CudaStepSizes::num_stats] or null
  DenseReason* reasons = nullptr;           // the same, or null
  std::uint64_t* nonfinite_rows = nullptr;  // [1] or null: select_cuda
};

/// Bytes of device memory, aligned to 256, that plan_step_cuda and the layers of its step need together. Layers of
/// equal shape share it. Reads no device memory; pointers may be null. Errors: as run_step_cuda.
[[nodiscard]] Result<std::int64_t> run_step_cuda_bytes(const CudaStepInput& step, const CudaStepLayer& layer);

/// `workspace`: planned by plan_step_cuda, and used by one stream; its tables stay until the next plan.
/// Errors: kInvalidArgument (the field, the value seen, what is allowed; a cache of another shape than the step's),
/// kUnsupported (as select_cuda and attend_cuda), kCudaError.
[[nodiscard]] Status run_step_cuda(const CudaStepInput& step, const CudaStepLayer& layer, void* workspace,
                                   std::int64_t workspace_bytes, void* stream);

}  // namespace compact
