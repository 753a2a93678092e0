#include "src/kv/page_allocator.h"

#include <fmt/format.h>

#include <numeric>

namespace compact {

PageAllocator::PageAllocator(std::int32_t num_pages)
    : holders_(static_cast<std::size_t>(num_pages), 0), free_(static_cast<std::size_t>(num_pages)) {
  std::iota(free_.rbegin(), free_.rend(), 0);  // page 0 on top
}

bool PageAllocator::allocate(std::span<std::int32_t> pages) noexcept {
  if (pages.size() > free_.size()) return false;
  for (std::int32_t& page : pages) {
    page = free_.back();
    free_.pop_back();
    holders_[static_cast<std::size_t>(page)] = 1;
  }
  return true;
}

Status PageAllocator::retain(std::int32_t page) {
  CA_RETURN_IF_ERROR(check_in_use("retain", page));
  ++holders_[static_cast<std::size_t>(page)];
  return {};
}

Result<bool> PageAllocator::release(std::int32_t page) {
  CA_RETURN_IF_ERROR(check_in_use("release", page));
  if (--holders_[static_cast<std::size_t>(page)] > 0) return false;
  free_.push_back(page);
  return true;
}

Status PageAllocator::check_in_use(const char* verb, std::int32_t page) const {
  if (page < 0 || page >= num_pages()) {
    return internal_error(fmt::format("{}: no page {}; the cache has {} pages", verb, page, num_pages()));
  }
  if (num_holders(page) == 0) return internal_error(fmt::format("{}: page {} is free already", verb, page));
  return {};
}

}  // namespace compact
