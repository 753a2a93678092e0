/// Where a model is computed, and what each place can do.
#pragma once

#include <string_view>

#include "compact/status.h"
#include "engine/model/chunk_attention.h"

namespace compact::engine {

enum class Backend : std::int32_t {
  kCpu = 0,
  kCuda = 1,  // one NVIDIA GPU
};
[[nodiscard]] const char* backend_name(Backend backend) noexcept;

/// "cpu", "cuda", or "auto": the GPU if this build has CUDA, there is a device for it and cuBLASLt is found, else the
/// CPU. What was chosen is printed with every result.
/// Errors: kInvalidArgument for another name; with "cuda" why it cannot be used.
[[nodiscard]] Result<Backend> resolve_backend(std::string_view name);

/// Whether a backend can store K and V so. Errors: kUnsupported with the value seen and what is allowed.
[[nodiscard]] Status check_backend_options(Backend backend, DType kv_dtype);

/// Whether the cuda backend has this selector, rule and union of its rows itself. The others run on the CPU, on a copy
/// of the cache: every layer waits for it, and the report says so (LayerReport::selected_on_host).
[[nodiscard]] bool selects_on_gpu(const SparsityOptions& options);

}  // namespace compact::engine
