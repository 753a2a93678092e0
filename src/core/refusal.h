/// What an entry point of the CUDA backend answers when it refuses its arguments: its own name, the field, the value
/// seen, what is allowed.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <utility>

#include "compact/status.h"

namespace compact {

struct Refusal {
  const char* caller;

  template <class... Args>
  [[nodiscard]] Status wrong(fmt::format_string<Args...> text, Args&&... args) const {
    return invalid_argument(fmt::format("{}: ", caller) + fmt::format(text, std::forward<Args>(args)...));
  }

  template <class... Args>
  [[nodiscard]] Status missing(fmt::format_string<Args...> text, Args&&... args) const {
    return unsupported(fmt::format("{}: ", caller) + fmt::format(text, std::forward<Args>(args)...));
  }

  /// Of a pointer that must be there. alignment in bytes.
  [[nodiscard]] Status check_pointer(const char* name, const void* pointer, std::uintptr_t alignment) const {
    if (pointer == nullptr) return wrong("{} is null", name);
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    if (address % alignment == 0) return {};
    return wrong("{} is at address {:#x}; a multiple of {} bytes", name, address, alignment);
  }

  /// Of a dimension of `count` rows of head_dim elements. A stride matters only where its index exceeds 0; 16-byte
  /// loads want multiples of 8 elements.
  [[nodiscard]] Status check_stride(const char* name, std::int64_t stride, std::int32_t count,
                                    std::int32_t head_dim) const {
    if (count > 1 && stride < head_dim) return wrong("{} is {}; at least head_dim = {}", name, stride, head_dim);
    if (stride % 8 != 0) return wrong("{} is {}; a multiple of 8 elements (16 bytes)", name, stride);
    return {};
  }
};

}  // namespace compact
