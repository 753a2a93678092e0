/// Matrix products in bf16 with fp32 sums, by cuBLASLt, which is loaded at run time: the executable starts without it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "compact/status.h"
#include "engine/cuda/device.h"

namespace compact::engine {

struct CublasLt;  // the library's functions

class Gemm {
 public:
  /// What cuBLASLt may use as scratch; one buffer serves the calls of one stream.
  static constexpr std::int64_t kWorkspaceBytes = 64 << 20;

  /// Errors: kUnsupported (the library is not found: where it was looked for), kCudaError.
  [[nodiscard]] static Result<std::unique_ptr<Gemm>> create();
  ~Gemm();

  /// The version whose interface is compiled against.
  [[nodiscard]] static const char* library() noexcept;

  enum class Output : std::int32_t { kBf16, kBf16Accumulate, kF32 };

  /// y[t, :] = W x[t, :], or += for kBf16Accumulate. All on the device, rows without gaps, 16-byte aligned.
  /// w: [out, in], x: [rows, in], bf16; y: [rows, out].
  /// Errors: kUnsupported (no kernel for the shape), kCudaError.
  [[nodiscard]] Status run(const void* w, const void* x, void* y, std::int32_t out, std::int32_t in, std::int32_t rows,
                           Output output, void* workspace, cudaStream_t stream);

 private:
  struct Plan;
  using Shape = std::tuple<std::int32_t, std::int32_t, std::int32_t, Output>;

  Gemm();
  [[nodiscard]] Result<const Plan*> plan_for(const Shape& shape);

  std::unique_ptr<CublasLt> lt_;
  std::mutex mutex_;  // of plans_
  std::map<Shape, std::unique_ptr<Plan>> plans_;
};

}  // namespace compact::engine
