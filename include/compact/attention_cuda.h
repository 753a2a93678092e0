/// Attention over page lists on an NVIDIA GPU. Asynchronous on the caller's stream: no synchronisation, no allocation,
/// nothing read back, so that it can be captured in a CUDA graph. No CUDA type appears here; a stream is a
/// cudaStream_t passed as a pointer. Works on the calling thread's current device.
#pragma once

#include <cstdint>

#include "compact/attention_unit.h"
#include "compact/cuda_backend.h"
#include "compact/status.h"
#include "compact/tensor_view.h"

namespace compact {

struct CudaDevice {
  std::int32_t capability = 0;  // 10 * major + minor
  std::int32_t num_sms = 0;
  CudaBackend backend = CudaBackend::kSm80;  // what kAuto means on it
};

/// The calling thread's current device. Errors: kUnsupported (build without CUDA, compute capability below 8.0),
/// kCudaError (no driver, no device).
[[nodiscard]] Result<CudaDevice> current_cuda_device();

/// All pointers are device pointers. q, k and v have kv.dtype, bf16 or f16. Base addresses are multiples of 16 bytes,
/// strides multiples of 8 elements. D is 64, 128 or 256; P a power of two from 16 to 256.
/// Sizes are host numbers; what the lists hold is known to the device alone.
struct CudaAttentionInput {
  const void* q = nullptr;  // [T, Hq, D]  post-RoPE
  std::int64_t q_token_stride = 0;
  std::int64_t q_head_stride = 0;
  std::int32_t num_q_tokens = 0;  // T
  std::int32_t num_q_heads = 0;   // Hq

  PagedKvView kv;  // one layer

  const AttentionUnit* units = nullptr;     // [max_units]; units with q_len 0 are skipped
  const std::int32_t* num_units = nullptr;  // [1] units in use, or null: max_units
  const std::int32_t* page_ids = nullptr;   // [num_list_pages]
  std::int32_t max_units = 0;
  std::int32_t heads_per_unit = 1;
  float softmax_scale = 0;  // s, above 0
};

struct CudaAttentionOutput {
  void* o = nullptr;  // [T, Hq, D] of kv.dtype; rows of no unit are left alone
  std::int64_t o_token_stride = 0;
  std::int64_t o_head_stride = 0;
  float* lse = nullptr;  // [T, Hq] or null; natural log; -inf for a row that sees nothing (o = 0)
  /// [1] on the device or null; never reset. The first failure that only the device can see: a CudaAttentionError. Work
  /// under check_lists begins only while it is 0.
  std::int32_t* error = nullptr;
};

struct CudaAttentionOptions {
  CudaBackend backend = CudaBackend::kAuto;
  /// 0: long lists are cut by load, bits depend on the whole batch. n: lists are cut every n tokens whatever the load,
  /// so that the bits of a request do not depend on the others. A multiple of 128; needs max_list_tokens.
  std::int32_t fixed_split_tokens = 0;
  std::int32_t max_list_tokens = 0;  // longest list; used with fixed_split_tokens only
  /// Checks every unit and every page id on the device first and reports in `error`; after a mistake nothing is
  /// computed. Without it a page id outside the cache reads as a page of zeros and a bad unit is undefined behaviour.
  bool check_lists = false;
};

/// What may stand in CudaAttentionOutput::error. With any of them nothing was computed.
enum class CudaAttentionError : std::int32_t {
  kNone = 0,
  kTooManyUnits = 1,   ///< *num_units outside [0, max_units]
  kTooManyMTiles = 2,  ///< units overlap or reach past T
  kTooManySlots = 3,   ///< a list longer than max_list_tokens under fixed_split_tokens
  kBadUnit = 4,        ///< check_lists: a field of a unit out of range
  kBadPageId = 5,      ///< check_lists: a page id outside [0, kv.num_pages)
};
[[nodiscard]] const char* cuda_attention_error_text(CudaAttentionError error) noexcept;

/// Bytes of device memory that attend_cuda needs for these sizes: aligned to 256, contents need not be kept between
/// calls; one workspace serves the calls of one stream. Reads no device memory; pointers may be null.
/// Errors: as attend_cuda.
[[nodiscard]] Result<std::int64_t> attend_cuda_workspace_bytes(const CudaAttentionInput& input,
                                                               const CudaAttentionOptions& options);

/// o and lse of every unit. Units must not share rows. Errors: kInvalidArgument (the field, the value seen, what is
/// allowed), kUnsupported (head dimension, dtype, page size, device, build without CUDA), kCudaError.
[[nodiscard]] Status attend_cuda(const CudaAttentionInput& input, const CudaAttentionOutput& output,
                                 const CudaAttentionOptions& options, void* workspace, std::int64_t workspace_bytes,
                                 void* stream);

}  // namespace compact
