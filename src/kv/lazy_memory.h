/// One block of zero bytes from the kernel that costs memory only where it is touched.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace compact {

struct UnmapMemory {
  std::size_t bytes = 0;
  void operator()(std::byte* data) const noexcept { ::munmap(data, bytes); }
};
using LazyMemory = std::unique_ptr<std::byte, UnmapMemory>;

/// Aligned to the machine's page (4096 bytes at least); null if the kernel refuses. Reservation is left on: under
/// the default overcommit rule a block larger than the machine's memory is refused here, with an error that the
/// caller can report, and not by the out-of-memory killer when the cache fills up.
[[nodiscard]] inline LazyMemory map_lazily(std::int64_t bytes) noexcept {
  const auto size = static_cast<std::size_t>(bytes);
  void* data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return {};
  return {static_cast<std::byte*>(data), UnmapMemory{size}};
}

}  // namespace compact
