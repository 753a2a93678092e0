/// Memory, streams and events of an NVIDIA GPU as owned objects; every failure a named Status.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "compact/status.h"
#include "engine/cuda/cuda_model.h"

namespace compact::engine {

/// kCudaError with the CUDA runtime's name and text unless `error` is success. `what` says what was tried.
[[nodiscard]] Status cuda_status(cudaError_t error, std::string_view what);

/// Bytes on the device; freed with the object.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  /// Errors: kOutOfMemory (for what, how much, how much is free), kCudaError.
  [[nodiscard]] static Result<DeviceBuffer> create(std::int64_t bytes, std::string_view what);
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceBuffer();

  [[nodiscard]] std::int64_t bytes() const noexcept { return bytes_; }
  [[nodiscard]] void* data() const noexcept { return data_; }
  template <class T>
  [[nodiscard]] T* as() const noexcept {
    return static_cast<T*>(data_);
  }

 private:
  void swap(DeviceBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  void* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

/// Page-locked bytes on the host: copies from here run beside the device's work.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  [[nodiscard]] static Result<PinnedBuffer> create(std::int64_t bytes);
  PinnedBuffer(PinnedBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~PinnedBuffer();
  [[nodiscard]] void* data() const noexcept { return data_; }

 private:
  explicit PinnedBuffer(void* data) : data_(data) {}
  void* data_ = nullptr;
};

class Stream {
 public:
  [[nodiscard]] static Result<Stream> create();
  Stream(Stream&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}
  Stream& operator=(Stream&& other) noexcept {
    std::swap(stream_, other.stream_);
    return *this;
  }
  ~Stream();
  [[nodiscard]] cudaStream_t get() const noexcept { return stream_; }
  /// Waits for everything queued. `what` names it in the error.
  [[nodiscard]] Status synchronize(std::string_view what) const;

 private:
  explicit Stream(cudaStream_t stream) : stream_(stream) {}
  cudaStream_t stream_ = nullptr;
};

/// A point in a stream, for times.
class Event {
 public:
  Event() = default;
  [[nodiscard]] static Result<Event> create();
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  ~Event();
  [[nodiscard]] cudaEvent_t get() const noexcept { return event_; }

 private:
  explicit Event(cudaEvent_t event) : event_(event) {}
  cudaEvent_t event_ = nullptr;
};

}  // namespace compact::engine
