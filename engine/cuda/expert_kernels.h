/// Around the products of a mixture of experts: which experts a token runs through, the order in which they are
/// computed, and the sum of their outputs. Launches only; errors show at the caller's next check of the stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/cuda/grouped_gemm.h"
#include "engine/cuda/kernels.h"

namespace compact::engine {

constexpr std::int32_t kMaxCudaExperts = 1024;        // E
constexpr std::int32_t kMaxCudaExpertsPerToken = 32;  // K

/// The K experts of the highest logits of every token, best first, of equals the lower one first, and their weights:
/// softmax over all E, divided by the sum of the chosen ones with `normalize`.
/// logits: [rows, E]; experts, weights: [rows, K].
cudaError_t launch_route_to_experts(const float* logits, std::int32_t rows, std::int32_t num_experts,
                                    std::int32_t per_token, bool normalize, std::int32_t* experts, float* weights,
                                    cudaStream_t stream);

/// Sorts the rows * K pairs of token and expert by expert, then token.
/// experts   [rows, K]
/// token_of  [rows K]   the token of every place of the sorted order
/// place_of  [rows, K]  where a pair stands in that order
/// tiles     [max_group_tiles(rows K, E)]  the experts' rows in that order, for launch_grouped_product
cudaError_t launch_sort_by_expert(const std::int32_t* experts, std::int32_t rows, std::int32_t per_token,
                                  std::int32_t num_experts, std::int32_t* token_of, std::int32_t* place_of,
                                  GroupTile* tiles, cudaStream_t stream);

/// residual[t, :] += sum over j of weights[t, j] * outputs[place_of[t, j], :], in the order of j, rounded once.
/// outputs: [rows K, width], residual: [rows, width]; width a multiple of 8.
cudaError_t launch_add_experts(const Bf16Bits* outputs, const std::int32_t* place_of, const float* weights,
                               std::int32_t rows, std::int32_t per_token, std::int32_t width, Bf16Bits* residual,
                               cudaStream_t stream);

}  // namespace compact::engine
