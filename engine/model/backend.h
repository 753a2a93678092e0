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

/// Whether a backend has all that the options ask for. Errors: kUnsupported with the option, and what is allowed.
[[nodiscard]] Status check_backend_options(Backend backend, const SparsityOptions& options, DType kv_dtype);

}  // namespace compact::engine
