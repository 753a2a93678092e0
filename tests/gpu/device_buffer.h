/// Device memory with guard bytes on both sides, filled with a pattern that shows unwritten and stray writes.
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

namespace compact::testing {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // A sticky error spoils every later test: stop here with the reason.
  fmt::print("FATAL {}: {} ({})\n", what, cudaGetErrorString(error), cudaGetErrorName(error));
  std::fflush(stdout);
  std::_Exit(3);
}
#define CA_TEST_CUDA(expr) ::compact::testing::check_cuda((expr), #expr)

class DeviceBuffer {
 public:
  static constexpr std::int64_t kGuardBytes = 1024;
  static constexpr unsigned char kGuard = 0xa5;
  static constexpr unsigned char kUnwritten = 0xff;  // NaN as fp32, bf16 and fp16; -1 as an id

  DeviceBuffer() = default;
  explicit DeviceBuffer(std::int64_t bytes) : bytes_(bytes) {
    CA_TEST_CUDA(cudaMalloc(&base_, static_cast<std::size_t>(bytes + 2 * kGuardBytes)));
    CA_TEST_CUDA(cudaMemset(base_, kGuard, static_cast<std::size_t>(bytes + 2 * kGuardBytes)));
    clear();
  }
  template <class T>
  explicit DeviceBuffer(const std::vector<T>& values)
      : DeviceBuffer(static_cast<std::int64_t>(values.size() * sizeof(T))) {
    upload(values);
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept : base_(other.base_), bytes_(other.bytes_) { other.base_ = nullptr; }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceBuffer() { cudaFree(base_); }

  void clear() { CA_TEST_CUDA(cudaMemset(data(), kUnwritten, static_cast<std::size_t>(bytes_))); }
  void* data() const { return static_cast<char*>(base_) + kGuardBytes; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }
  std::int64_t bytes() const { return bytes_; }
  template <class T>
  void upload(const std::vector<T>& values) {
    CA_TEST_CUDA(cudaMemcpy(data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  template <class T>
  std::vector<T> download(std::size_t count) const {
    std::vector<T> values(count);
    CA_TEST_CUDA(cudaMemcpy(values.data(), data(), count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }
  /// True if nobody wrote outside the buffer.
  bool guards_intact() const {
    std::vector<unsigned char> guard(2 * kGuardBytes);
    CA_TEST_CUDA(cudaMemcpy(guard.data(), base_, kGuardBytes, cudaMemcpyDeviceToHost));
    CA_TEST_CUDA(cudaMemcpy(guard.data() + kGuardBytes, static_cast<char*>(data()) + bytes_, kGuardBytes,
                            cudaMemcpyDeviceToHost));
    for (const unsigned char byte : guard) {
      if (byte != kGuard) return false;
    }
    return true;
  }

 private:
  void* base_ = nullptr;
  std::int64_t bytes_ = 0;
};

}  // namespace compact::testing
