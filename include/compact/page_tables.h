/// Who holds which page of a paged KV cache: page tables, lengths and reference counts, without any memory of its own.
///
/// PagedKvCache (paged_kv.h) keeps its pages by it. An engine whose pages lie elsewhere, on a device, keeps the same
/// books: `extend` says which pages a request may write, everybody else may read them. Thread safety: none.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "compact/status.h"

namespace compact {

/// Names a live request of one cache. Ids are never reused.
using RequestId = std::int64_t;

/// What `extend` did to a page table.
struct PageExtension {
  std::int32_t first_new = 0;  // entries of the page table from here on are pages that nobody else holds
  /// The shared page whose place the first of them took; its holders still have it. -1: none.
  std::int32_t replaced_page = -1;
};

class PageTables {
 public:
  /// All pages free. Errors: kInvalidArgument (a number below 1), kOutOfMemory.
  [[nodiscard]] static Result<PageTables> create(std::int32_t num_pages, std::int32_t page_tokens);

  PageTables(PageTables&&) noexcept;
  PageTables& operator=(PageTables&&) noexcept;
  ~PageTables();

  [[nodiscard]] std::int32_t page_tokens() const noexcept;  // P
  [[nodiscard]] std::int32_t num_pages() const noexcept;
  [[nodiscard]] std::int32_t num_free_pages() const noexcept;
  [[nodiscard]] std::int64_t num_requests() const noexcept;
  /// Requests and others that hold the page; 0 for a free page and for none of the cache.
  [[nodiscard]] std::int32_t num_holders(std::int32_t page) const noexcept;

  /// A request whose first tokens are those of `prefix_pages`, complete pages that somebody holds already; empty: a
  /// request with no tokens. Needs no free page. Errors: kInvalidArgument (a page that nobody holds, a context past
  /// 2^31 - P tokens), kOutOfMemory; nothing changed then.
  [[nodiscard]] Result<RequestId> add_request(std::span<const std::int32_t> prefix_pages = {});

  /// A new request that shares the pages of the first `tokens` tokens of `parent`, an incomplete last one too. Errors:
  /// kInvalidArgument (unknown parent; tokens outside [0, its length]), kOutOfMemory.
  [[nodiscard]] Result<RequestId> fork(RequestId parent, std::int32_t tokens);

  /// Drops the tokens from `tokens` on. Errors: kInvalidArgument (unknown request, tokens outside [0, length]).
  [[nodiscard]] Status truncate(RequestId request, std::int32_t tokens);

  /// Forgets the request; pages that nobody else holds are free again.
  [[nodiscard]] Status release(RequestId request);

  /// Free pages that `extend` would take. Errors: as `extend`, kOutOfMemory excluded.
  [[nodiscard]] Result<std::int32_t> pages_to_extend(RequestId request, std::int32_t tokens,
                                                     bool replace_shared_tail = false) const;

  /// Makes room for `tokens` more tokens. Either all pages are had or nothing changes. replace_shared_tail: an
  /// incomplete last page that others hold too gives way to a new one, into which the caller copies what it keeps.
  /// Errors: kOutOfMemory (says pages needed and free), kInvalidArgument (unknown request, negative count, a context
  /// past 2^31 - P tokens).
  [[nodiscard]] Result<PageExtension> extend(RequestId request, std::int32_t tokens, bool replace_shared_tail = false);

  /// One more holder of a page that somebody holds, and one fewer: for whoever keeps pages without being a request.
  /// Errors: kInternal for a free page and for none of the cache.
  [[nodiscard]] Status hold(std::int32_t page);
  [[nodiscard]] Status drop(std::int32_t page);

  /// Tokens that the request has room for.
  [[nodiscard]] Result<std::int32_t> length(RequestId request) const;

  /// Physical pages in logical order, [ceil(length / P)]. Valid until the next call that is not const.
  [[nodiscard]] Result<std::span<const std::int32_t>> page_table(RequestId request) const;

 private:
  struct Impl;
  explicit PageTables(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace compact
