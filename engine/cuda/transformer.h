/// Llama-3.x and Qwen3 (dense and mixture of experts) on one GPU: weights, products and what every request on it
/// shares.
#pragma once

#include <memory>
#include <string>

#include "engine/cuda/device.h"
#include "engine/cuda/gemm.h"
#include "engine/cuda/weights.h"
#include "engine/model/model.h"

namespace compact::engine {

class CudaTransformer final : public Model {
 public:
  /// Errors: kUnsupported (a head dimension or width without kernels, no cuBLASLt), kOutOfMemory, kCudaError.
  [[nodiscard]] static Result<std::unique_ptr<Model>> create(const ModelConfig& config, std::string device_name,
                                                             CudaWeights weights);

  [[nodiscard]] const ModelConfig& config() const noexcept override { return config_; }
  [[nodiscard]] std::int64_t weight_bytes() const noexcept override { return weights_.bytes(); }
  [[nodiscard]] Backend backend() const noexcept override { return Backend::kCuda; }
  [[nodiscard]] std::string processor() const override { return device_name_; }
  [[nodiscard]] Result<std::unique_ptr<Batch>> start(const BatchOptions& options) const override;

  [[nodiscard]] const CudaWeights& weights() const noexcept { return weights_; }
  [[nodiscard]] Gemm& gemm() const noexcept { return *gemm_; }
  [[nodiscard]] const float* inverse_frequencies() const noexcept { return inverse_frequencies_.as<float>(); }

 private:
  CudaTransformer(ModelConfig config, std::string device_name, CudaWeights weights)
      : config_(std::move(config)), device_name_(std::move(device_name)), weights_(std::move(weights)) {}

  ModelConfig config_;
  std::string device_name_;
  CudaWeights weights_;
  std::unique_ptr<Gemm> gemm_;
  DeviceBuffer inverse_frequencies_;  // [D/2]
};

/// What the kernels can compute. Errors: kUnsupported with the key of config.json, the value seen and what is allowed.
[[nodiscard]] Status check_cuda_config(const ModelConfig& config);

}  // namespace compact::engine
