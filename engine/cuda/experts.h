/// A mixture of experts in place of an MLP, on the GPU: router, order by expert, grouped products, weighted sum. Queued
/// without a wait: which expert has how many tokens is known to the device alone.
#pragma once

#include <cstdint>

#include "engine/cuda/expert_kernels.h"
#include "engine/cuda/gemm.h"
#include "engine/cuda/weights.h"
#include "engine/loader/model_config.h"

namespace compact::engine {

class CudaExperts {
 public:
  CudaExperts() = default;
  /// Errors: kOutOfMemory, kCudaError.
  [[nodiscard]] static Result<CudaExperts> create(const ModelConfig& config, std::int32_t max_rows);

  /// residual[t, :] += the weighted outputs of x[t, :]'s experts.  x, residual: [rows, hidden] bf16.
  /// gemm_workspace: of Gemm::kWorkspaceBytes. Errors: those of Gemm; kCudaError.
  [[nodiscard]] Status add(const CudaBlock& block, const Bf16Bits* x, std::int32_t rows, Bf16Bits* residual, Gemm& gemm,
                           void* gemm_workspace, cudaStream_t stream) const;

 private:
  ExpertConfig config_;
  std::int32_t hidden_ = 0;
  DeviceBuffer logits_;    // fp32 [rows, E]
  DeviceBuffer experts_;   // [rows, K]
  DeviceBuffer weights_;   // fp32 [rows, K]
  DeviceBuffer token_of_;  // [rows K]
  DeviceBuffer place_of_;  // [rows, K]
  DeviceBuffer tiles_;     // GroupTile [max_group_tiles]
  DeviceBuffer inner_;     // bf16 [rows K, intermediate]
  DeviceBuffer outputs_;   // bf16 [rows K, hidden]
};

}  // namespace compact::engine
