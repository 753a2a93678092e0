/// Models on an NVIDIA GPU. No CUDA type: the build without CUDA keeps the promise with an error (none.cc).
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "compact/status.h"
#include "engine/loader/model_config.h"
#include "engine/model/model.h"

namespace compact::engine {

/// The calling thread's current device.
struct CudaDeviceInfo {
  std::string name;             // e.g. "NVIDIA H200"
  std::int32_t capability = 0;  // 10 * major + minor
  std::int32_t num_sms = 0;
  std::int64_t memory_bytes = 0;
  std::int64_t free_bytes = 0;
  std::string gemm_library;  // what cuBLASLt was found as, or why it was not
  bool usable = false;       // the engine can run here
};
/// Errors: kUnsupported (build without CUDA, compute capability below 8.0), kCudaError (no driver, no device).
[[nodiscard]] Result<CudaDeviceInfo> cuda_device_info();

/// Maps the weights of a Hugging Face model directory and copies them to the device as bf16. Shows its progress on a
/// terminal. Errors: those of Transformer::load; kUnsupported (no CUDA, no cuBLASLt, a head dimension without kernels);
/// kOutOfMemory (how much is needed and free).
[[nodiscard]] Result<std::unique_ptr<Model>> load_cuda_model(const std::filesystem::path& directory);

/// The same model with weights drawn on the device from a seed: right in size and speed, without meaning.
[[nodiscard]] Result<std::unique_ptr<Model>> make_random_cuda_model(const ModelConfig& config, std::uint64_t seed);

/// Device memory of this process: in use, and the most that it was since the last reset.
struct CudaMemoryUse {
  std::int64_t bytes = 0;
  std::int64_t peak_bytes = 0;
};
[[nodiscard]] CudaMemoryUse cuda_memory_use() noexcept;
void reset_cuda_memory_peak() noexcept;

/// TFLOP/s of a bf16 product of three n x n matrices of random values: what the device gives a whole model at best.
[[nodiscard]] Result<double> measure_cuda_gemm_tflops(std::int32_t n);

}  // namespace compact::engine
