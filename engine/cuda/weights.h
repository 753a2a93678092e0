/// The weights of a transformer on the device: bf16 matrices, fp32 vectors, in one allocation.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "compact/status.h"
#include "engine/cuda/device.h"
#include "engine/cuda/kernels.h"
#include "engine/loader/model_config.h"

namespace compact::engine {

/// One layer. Matrices that read the same input lie one after the other and are multiplied as one.
struct CudaBlock {
  const float* attention_norm = nullptr;  // [hidden]
  const Bf16Bits* qkv = nullptr;          // [(Hq + 2 Hkv) D, hidden]  query, key, value rows
  const float* q_norm = nullptr;          // [D] or null
  const float* k_norm = nullptr;          // [D] or null
  const Bf16Bits* o = nullptr;            // [hidden, Hq D]
  const float* mlp_norm = nullptr;        // [hidden]
  const Bf16Bits* router = nullptr;       // [E, hidden], or null: no experts, E = 1 below
  const Bf16Bits* gate_up = nullptr;      // [E, 2 intermediate, hidden]
  const Bf16Bits* down = nullptr;         // [E, hidden, intermediate]
};

class CudaWeights {
 public:
  /// From a Hugging Face model directory, through page-locked memory in big pieces; F32 and F16 are rounded to bf16 on
  /// the device. Errors: those of Checkpoint; kOutOfMemory, kCudaError.
  [[nodiscard]] static Result<CudaWeights> load(const ModelConfig& config, const std::filesystem::path& directory);

  /// Uniform random matrices that keep activations near 1, norms of 1. Same seed, same weights.
  [[nodiscard]] static Result<CudaWeights> random(const ModelConfig& config, std::uint64_t seed);

  [[nodiscard]] const Bf16Bits* embedding() const noexcept { return embedding_; }  // [vocab, hidden]
  [[nodiscard]] const std::vector<CudaBlock>& blocks() const noexcept { return blocks_; }
  [[nodiscard]] const float* final_norm() const noexcept { return final_norm_; }  // [hidden]
  [[nodiscard]] const Bf16Bits* lm_head() const noexcept { return lm_head_; }     // [vocab, hidden]
  [[nodiscard]] std::int64_t bytes() const noexcept { return memory_.bytes(); }

 private:
  CudaWeights() = default;
  /// Visits every tensor of a checkpoint in the order in which they lie: matrix(name, out, in) and vector(name, size)
  /// return where it goes.
  template <class Matrix, class Vector>
  [[nodiscard]] Status lay_out(const ModelConfig& config, Matrix matrix, Vector vector);
  [[nodiscard]] Status allocate(const ModelConfig& config);

  DeviceBuffer memory_;
  const Bf16Bits* embedding_ = nullptr;
  std::vector<CudaBlock> blocks_;  // [num_hidden_layers]
  const float* final_norm_ = nullptr;
  const Bf16Bits* lm_head_ = nullptr;
};

}  // namespace compact::engine
