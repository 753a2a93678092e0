#include "src/attention/sm90/tensor_maps.h"

#include <cuda_runtime_api.h>

#include <string>

namespace compact {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(function)
                                                                      : nullptr;
}

}  // namespace

Status encode_tensor_map(CUtensorMap& map, const char* name, DType dtype, const void* base,
                         std::span<const std::uint64_t> sizes, std::span<const std::int64_t> strides,
                         std::span<const std::uint32_t> box) {
  static const EncodeTiled encode = find_encoder();
  if (encode == nullptr)
    return unsupported("tensor maps: the CUDA driver has no cuTensorMapEncodeTiled (12.0 or newer)");
  constexpr std::uint64_t kElementBytes = 2, kMaxStrideBytes = std::uint64_t{1} << 40;
  if (base == nullptr || reinterpret_cast<std::uintptr_t>(base) % 16 != 0) {
    return invalid_argument(std::string("tensor map of ") + name + ": base address must be a multiple of 16 bytes");
  }
  std::uint64_t stride_bytes[4];
  for (std::size_t i = 0; i < strides.size(); ++i) {
    if (sizes[i + 1] == 1) {  // never used, yet the driver wants a legal one
      stride_bytes[i] = sizes[0] * kElementBytes;
      continue;
    }
    stride_bytes[i] = static_cast<std::uint64_t>(strides[i]) * kElementBytes;
    if (strides[i] <= 0 || strides[i] % 8 != 0 || stride_bytes[i] >= kMaxStrideBytes) {
      return invalid_argument(std::string("tensor map of ") + name + ": stride " + std::to_string(strides[i]) +
                              " elements; allowed: positive multiples of 8 below 2^39");
    }
  }
  const std::uint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(&map, dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             static_cast<std::uint32_t>(sizes.size()), const_cast<void*>(base), sizes.data(), stride_bytes, box.data(),
             element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return invalid_argument(std::string("tensor map of ") + name + ": the driver refuses it (CUresult " +
                            std::to_string(static_cast<int>(result)) + ")");
  }
  return {};
}

}  // namespace compact
