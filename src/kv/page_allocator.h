/// Free list of physical KV pages with reference counts. Knows page ids only, not what lies in a page.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "compact/status.h"

namespace compact {

class PageAllocator {
 public:
  /// All pages free. May throw std::bad_alloc (8 bytes a page).
  explicit PageAllocator(std::int32_t num_pages);

  [[nodiscard]] std::int32_t num_pages() const noexcept { return static_cast<std::int32_t>(holders_.size()); }
  [[nodiscard]] std::int32_t num_free() const noexcept { return static_cast<std::int32_t>(free_.size()); }

  /// Fills `pages` with free pages, one holder each. False, and nothing changes, if there are too few.
  ///
  /// Order: last freed first, and never-used pages by ascending id. A freed page has its memory already and may
  /// still be in a CPU cache, so the memory touched stays at the high-water mark of pages in use; and the same
  /// calls give the same ids on every run.
  [[nodiscard]] bool allocate(std::span<std::int32_t> pages) noexcept;

  /// One more holder. Error: kInternal if the page is free or does not exist.
  [[nodiscard]] Status retain(std::int32_t page);

  /// One holder fewer; true if that was the last and the page is free again.
  /// Error: kInternal if the page is free already (a double release) or does not exist.
  [[nodiscard]] Result<bool> release(std::int32_t page);

  /// 0 for a free page. Precondition: 0 <= page < num_pages().
  [[nodiscard]] std::int32_t num_holders(std::int32_t page) const noexcept {
    return holders_[static_cast<std::size_t>(page)];
  }

 private:
  [[nodiscard]] Status check_in_use(const char* verb, std::int32_t page) const;

  std::vector<std::int32_t> holders_;  // [num_pages]  0 = free
  std::vector<std::int32_t> free_;     // stack, top at the back; capacity num_pages, so release never allocates
};

}  // namespace compact
