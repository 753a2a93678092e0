#include "engine/cuda/experts.h"

namespace compact::engine {

Result<CudaExperts> CudaExperts::create(const ModelConfig& config, std::int32_t max_rows) {
  CudaExperts experts;
  experts.config_ = config.experts;
  experts.hidden_ = config.hidden_size;
  const std::int32_t pairs = max_rows * config.experts.experts_per_token;
  const auto take = [](DeviceBuffer& buffer, std::int64_t bytes) -> Status {
    CA_ASSIGN_OR_RETURN(buffer, DeviceBuffer::create(bytes, "the experts' activations"));
    return {};
  };
  CA_RETURN_IF_ERROR(take(experts.logits_, std::int64_t{max_rows} * config.experts.num_experts * 4));
  CA_RETURN_IF_ERROR(take(experts.experts_, std::int64_t{pairs} * 4));
  CA_RETURN_IF_ERROR(take(experts.weights_, std::int64_t{pairs} * 4));
  CA_RETURN_IF_ERROR(take(experts.token_of_, std::int64_t{pairs} * 4));
  CA_RETURN_IF_ERROR(take(experts.place_of_, std::int64_t{pairs} * 4));
  CA_RETURN_IF_ERROR(
      take(experts.tiles_, max_group_tiles(pairs, config.experts.num_experts) * std::int64_t{sizeof(GroupTile)}));
  CA_RETURN_IF_ERROR(take(experts.inner_, std::int64_t{pairs} * config.experts.intermediate_size * 2));
  CA_RETURN_IF_ERROR(take(experts.outputs_, std::int64_t{pairs} * config.hidden_size * 2));
  return experts;
}

Status CudaExperts::add(const CudaBlock& block, const Bf16Bits* x, std::int32_t rows, Bf16Bits* residual, Gemm& gemm,
                        void* gemm_workspace, cudaStream_t stream) const {
  const ExpertConfig& c = config_;
  const std::int32_t pairs = rows * c.experts_per_token;
  auto* const experts = experts_.as<std::int32_t>();
  auto* const token_of = token_of_.as<std::int32_t>();
  auto* const place_of = place_of_.as<std::int32_t>();
  CA_RETURN_IF_ERROR(gemm.run(block.router, x, logits_.data(), c.num_experts, hidden_, rows, Gemm::Output::kF32,
                              gemm_workspace, stream));
  CA_RETURN_IF_ERROR(cuda_status(launch_route_to_experts(logits_.as<float>(), rows, c.num_experts, c.experts_per_token,
                                                         c.normalize_weights, experts, weights_.as<float>(), stream),
                                 "the choice of experts"));
  CA_RETURN_IF_ERROR(cuda_status(launch_sort_by_expert(experts, rows, c.experts_per_token, c.num_experts, token_of,
                                                       place_of, tiles_.as<GroupTile>(), stream),
                                 "the order by expert"));
  GroupedProduct product{.x = x,
                         .x_rows = token_of,
                         .w = block.gate_up,
                         .y = inner_.as<Bf16Bits>(),
                         .tiles = tiles_.as<GroupTile>(),
                         .num_tiles = max_group_tiles(pairs, c.num_experts),
                         .in = hidden_,
                         .out = c.intermediate_size,
                         .gated = true};
  CA_RETURN_IF_ERROR(cuda_status(launch_grouped_product(product, stream), "the experts' first product"));
  product.x = inner_.as<Bf16Bits>();
  product.x_rows = nullptr;
  product.w = block.down;
  product.y = outputs_.as<Bf16Bits>();
  product.in = c.intermediate_size;
  product.out = hidden_;
  product.gated = false;
  CA_RETURN_IF_ERROR(cuda_status(launch_grouped_product(product, stream), "the experts' second product"));
  return cuda_status(launch_add_experts(outputs_.as<Bf16Bits>(), place_of, weights_.as<float>(), rows,
                                        c.experts_per_token, hidden_, residual, stream),
                     "the sum of the experts");
}

}  // namespace compact::engine
