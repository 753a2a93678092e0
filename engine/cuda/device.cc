#include "engine/cuda/device.h"

#include <fmt/format.h>

#include <atomic>

namespace compact::engine {
namespace {

std::atomic<std::int64_t> bytes_in_use = 0;
std::atomic<std::int64_t> peak_bytes = 0;

void count_bytes(std::int64_t bytes) noexcept {
  const std::int64_t now = bytes_in_use += bytes;
  std::int64_t peak = peak_bytes;
  while (now > peak && !peak_bytes.compare_exchange_weak(peak, now)) {
  }
}

}  // namespace

CudaMemoryUse cuda_memory_use() noexcept { return {bytes_in_use, peak_bytes}; }
void reset_cuda_memory_peak() noexcept { peak_bytes = bytes_in_use.load(); }

Status cuda_status(cudaError_t error, std::string_view what) {
  if (error == cudaSuccess) return {};
  return cuda_error(fmt::format("cuda: {}: {} ({})", what, cudaGetErrorString(error), cudaGetErrorName(error)));
}

Result<DeviceBuffer> DeviceBuffer::create(std::int64_t bytes, std::string_view what) {
  DeviceBuffer buffer;
  if (bytes == 0) return buffer;
  const cudaError_t error = cudaMalloc(&buffer.data_, static_cast<std::size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());  // not sticky: the next call must not see it
    std::size_t free = 0, total = 0;
    CA_RETURN_IF_ERROR(cuda_status(cudaMemGetInfo(&free, &total), "memory query"));
    return out_of_memory(fmt::format(
        "the GPU has no room for {}: {:.2f} GB are needed, {:.2f} of {:.2f} GB are free\n"
        "  try: a shorter prompt, a smaller --chunk or --kv-pages, or a GPU that nobody else uses",
        what, static_cast<double>(bytes) / 1e9, static_cast<double>(free) / 1e9, static_cast<double>(total) / 1e9));
  }
  CA_RETURN_IF_ERROR(cuda_status(error, fmt::format("memory for {}", what)));
  buffer.bytes_ = bytes;
  count_bytes(bytes);
  return buffer;
}

DeviceBuffer::~DeviceBuffer() {
  if (data_ == nullptr) return;
  cudaFree(data_);
  count_bytes(-bytes_);
}

Result<PinnedBuffer> PinnedBuffer::create(std::int64_t bytes) {
  void* data = nullptr;
  CA_RETURN_IF_ERROR(
      cuda_status(cudaMallocHost(&data, static_cast<std::size_t>(bytes)),
                  fmt::format("{:.1f} MB of page-locked host memory", static_cast<double>(bytes) / 1e6)));
  return PinnedBuffer(data);
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ != nullptr) cudaFreeHost(data_);
}

Result<Stream> Stream::create() {
  cudaStream_t stream = nullptr;
  CA_RETURN_IF_ERROR(cuda_status(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream"));
  return Stream(stream);
}

Stream::~Stream() {
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

Status Stream::synchronize(std::string_view what) const { return cuda_status(cudaStreamSynchronize(stream_), what); }

Result<Event> Event::create() {
  cudaEvent_t event = nullptr;
  CA_RETURN_IF_ERROR(cuda_status(cudaEventCreate(&event), "an event"));
  return Event(event);
}

Event::~Event() {
  if (event_ != nullptr) cudaEventDestroy(event_);
}

}  // namespace compact::engine
