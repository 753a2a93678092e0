#include "engine/cuda/transformer.h"

#include <fmt/format.h>

#include <tuple>
#include <utility>
#include <vector>

#include "compact/attention_cuda.h"
#include "engine/cuda/batch.h"
#include "engine/cuda/cuda_model.h"
#include "engine/cuda/expert_kernels.h"
#include "engine/loader/rope_frequencies.h"

namespace compact::engine {

Status check_cuda_config(const ModelConfig& config) {
  if (config.head_dim != 64 && config.head_dim != 128 && config.head_dim != 256) {
    return unsupported(fmt::format("head_dim is {}\n  allowed on a GPU: 64, 128, 256", config.head_dim));
  }
  // Rows are moved in pieces of 16 bytes.
  for (const auto& [key, width] :
       {std::pair("hidden_size", config.hidden_size), std::pair("intermediate_size", config.intermediate_size),
        std::pair("moe_intermediate_size", config.experts.intermediate_size)}) {
    if (width % 8 != 0) return unsupported(fmt::format("{} is {}\n  allowed on a GPU: a multiple of 8", key, width));
  }
  for (const auto& [key, number, most] :
       {std::tuple("num_experts", config.experts.num_experts, kMaxCudaExperts),
        std::tuple("num_experts_per_tok", config.experts.experts_per_token, kMaxCudaExpertsPerToken)}) {
    if (number > most) return unsupported(fmt::format("{} is {}\n  allowed on a GPU: up to {}", key, number, most));
  }
  return {};
}

Result<std::unique_ptr<Model>> CudaTransformer::create(const ModelConfig& config, std::string device_name,
                                                       CudaWeights weights) {
  std::unique_ptr<CudaTransformer> model(new CudaTransformer(config, std::move(device_name), std::move(weights)));
  CA_ASSIGN_OR_RETURN(model->gemm_, Gemm::create());
  const std::vector<float> frequencies = rope_inverse_frequencies(config);
  const std::size_t bytes = frequencies.size() * sizeof(float);
  CA_ASSIGN_OR_RETURN(model->inverse_frequencies_,
                      DeviceBuffer::create(static_cast<std::int64_t>(bytes), "rotation frequencies"));
  CA_ASSIGN_OR_RETURN(const Stream stream, Stream::create());
  CA_RETURN_IF_ERROR(cuda_status(cudaMemcpyAsync(model->inverse_frequencies_.data(), frequencies.data(), bytes,
                                                 cudaMemcpyHostToDevice, stream.get()),
                                 "rotation frequencies"));
  CA_RETURN_IF_ERROR(stream.synchronize("rotation frequencies"));
  return std::unique_ptr<Model>(std::move(model));
}

Result<std::unique_ptr<Batch>> CudaTransformer::start(const BatchOptions& options) const {
  return CudaBatch::create(*this, options);
}

namespace {

Result<std::string> usable_device() {
  CA_ASSIGN_OR_RETURN(const CudaDeviceInfo device, cuda_device_info());
  if (!device.usable) return unsupported(device.gemm_library);
  return device.name;
}

}  // namespace

Result<CudaDeviceInfo> cuda_device_info() {
  CA_ASSIGN_OR_RETURN(const CudaDevice device, current_cuda_device());
  CudaDeviceInfo info;
  info.capability = device.capability;
  info.num_sms = device.num_sms;
  int index = 0;
  cudaDeviceProp properties{};
  CA_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&index), "device query"));
  CA_RETURN_IF_ERROR(cuda_status(cudaGetDeviceProperties(&properties, index), "device query"));
  info.name = properties.name;
  std::size_t free = 0, total = 0;
  CA_RETURN_IF_ERROR(cuda_status(cudaMemGetInfo(&free, &total), "memory query"));
  info.memory_bytes = static_cast<std::int64_t>(total);
  info.free_bytes = static_cast<std::int64_t>(free);
  const auto gemm = Gemm::create();
  info.usable = gemm.ok();
  info.gemm_library = gemm.ok() ? Gemm::library() : gemm.status().message();
  return info;
}

Result<std::unique_ptr<Model>> load_cuda_model(const std::filesystem::path& directory) {
  CA_ASSIGN_OR_RETURN(std::string device, usable_device());
  CA_ASSIGN_OR_RETURN(const ModelConfig config, load_model_config(directory));
  CA_RETURN_IF_ERROR(check_cuda_config(config));
  CA_ASSIGN_OR_RETURN(CudaWeights weights, CudaWeights::load(config, directory));
  return CudaTransformer::create(config, std::move(device), std::move(weights));
}

Result<std::unique_ptr<Model>> make_random_cuda_model(const ModelConfig& config, std::uint64_t seed) {
  CA_ASSIGN_OR_RETURN(std::string device, usable_device());
  CA_RETURN_IF_ERROR(check_cuda_config(config));
  CA_ASSIGN_OR_RETURN(CudaWeights weights, CudaWeights::random(config, seed));
  return CudaTransformer::create(config, std::move(device), std::move(weights));
}

Result<double> measure_cuda_gemm_tflops(std::int32_t n) {
  constexpr int kRuns = 20;
  CA_ASSIGN_OR_RETURN(const std::unique_ptr<Gemm> gemm, Gemm::create());
  CA_ASSIGN_OR_RETURN(const Stream stream, Stream::create());
  CA_ASSIGN_OR_RETURN(const DeviceBuffer workspace, DeviceBuffer::create(Gemm::kWorkspaceBytes, "products"));
  const std::int64_t count = std::int64_t{n} * n;
  DeviceBuffer matrices[3];
  std::uint64_t seed = 1;
  for (DeviceBuffer& matrix : matrices) {
    CA_ASSIGN_OR_RETURN(matrix, DeviceBuffer::create(count * 2, "a product's matrix"));
    CA_RETURN_IF_ERROR(
        cuda_status(launch_fill_random(seed++, 1.0F, count, matrix.as<Bf16Bits>(), stream.get()), "random matrix"));
  }
  const auto product = [&] {
    return gemm->run(matrices[0].data(), matrices[1].data(), matrices[2].data(), n, n, n, Gemm::Output::kBf16,
                     workspace.data(), stream.get());
  };
  for (int i = 0; i < 3; ++i) CA_RETURN_IF_ERROR(product());
  CA_ASSIGN_OR_RETURN(const Event begin, Event::create());
  CA_ASSIGN_OR_RETURN(const Event end, Event::create());
  CA_RETURN_IF_ERROR(cuda_status(cudaEventRecord(begin.get(), stream.get()), "timing"));
  for (int i = 0; i < kRuns; ++i) CA_RETURN_IF_ERROR(product());
  CA_RETURN_IF_ERROR(cuda_status(cudaEventRecord(end.get(), stream.get()), "timing"));
  CA_RETURN_IF_ERROR(stream.synchronize("products"));
  float ms = 0;
  CA_RETURN_IF_ERROR(cuda_status(cudaEventElapsedTime(&ms, begin.get(), end.get()), "timing"));
  return 2.0 * kRuns * static_cast<double>(count) * n / (static_cast<double>(ms) * 1e9);
}

}  // namespace compact::engine
