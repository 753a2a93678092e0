/// The kernels of a transformer that are neither attention nor products. bf16 in and out, fp32 inside. Launches only;
/// errors show at the caller's next check of the stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace compact::engine {

using Bf16Bits = std::uint16_t;  // bfloat16, as it lies in memory

/// out[t, :] = table[tokens[t], :].  table: [vocab, width], out: [rows, width]; width a multiple of 8.
cudaError_t launch_embed(const std::int32_t* tokens, const Bf16Bits* table, std::int32_t rows, std::int32_t width,
                         Bf16Bits* out, cudaStream_t stream);

/// out[t, :] = x[t, :] / rms(x[t, :]) * weight, rounded once.  x, out: [rows, width], weight: [width]; width a multiple
/// of 8.
cudaError_t launch_rms_norm(const Bf16Bits* x, const float* weight, float eps, std::int32_t rows, std::int32_t width,
                            Bf16Bits* out, cudaStream_t stream);

/// out[t, i] = silu(gate_up[t, i]) * gate_up[t, width + i].  gate_up: [rows, 2 width], out: [rows, width]; width a
/// multiple of 8.
cudaError_t launch_silu_multiply(const Bf16Bits* gate_up, std::int32_t rows, std::int32_t width, Bf16Bits* out,
                                 cudaStream_t stream);

/// out[i] = x[i] rounded to nearest even.
cudaError_t launch_narrow(const float* x, std::int64_t count, Bf16Bits* out, cudaStream_t stream);

/// out[i] uniform in [-limit, limit): a hash of (seed, i).
cudaError_t launch_fill_random(std::uint64_t seed, float limit, std::int64_t count, Bf16Bits* out, cudaStream_t stream);

}  // namespace compact::engine
