#include "compact/page_tables.h"

#include <fmt/format.h>

#include <limits>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

#include "src/kv/page_allocator.h"

namespace compact {
namespace {

struct Request {
  std::int32_t length = 0;          // tokens that there is room for
  std::vector<std::int32_t> pages;  // [ceil(length / P)]  physical, in logical order
};

}  // namespace

struct PageTables::Impl {
  std::int32_t page_tokens;
  PageAllocator allocator;
  std::unordered_map<RequestId, Request> requests;
  RequestId next_id = 0;

  Impl(std::int32_t num_pages, std::int32_t tokens) : page_tokens(tokens), allocator(num_pages) {}

  std::int32_t pages_for(std::int32_t tokens) const {
    return static_cast<std::int32_t>((std::int64_t{tokens} + page_tokens - 1) / page_tokens);
  }
  // Whole pages below 2^31, so that a context rounded up to pages is an int32 everywhere.
  std::int32_t max_context() const { return std::numeric_limits<std::int32_t>::max() - (page_tokens - 1); }

  Result<Request*> find(const char* verb, RequestId id) {
    const auto found = requests.find(id);
    if (found == requests.end()) return invalid_argument(fmt::format("{}: unknown request {}", verb, id));
    return &found->second;
  }

  bool tail_shared(const Request& request) const {
    return request.length % page_tokens != 0 && allocator.num_holders(request.pages.back()) > 1;
  }

  Status drop_from(Request& request, std::size_t num_kept) {
    // From the back, so that the free list hands the pages out again in logical order.
    while (request.pages.size() > num_kept) {
      CA_RETURN_IF_ERROR(allocator.release(request.pages.back()).status());
      request.pages.pop_back();
    }
    return {};
  }

  // A request of these pages, which are held already.
  Result<RequestId> share(const char* verb, std::span<const std::int32_t> pages, std::int32_t tokens) {
    const RequestId id = next_id;
    try {
      requests[id] = {tokens, {pages.begin(), pages.end()}};
    } catch (const std::bad_alloc&) {
      requests.erase(id);
      return out_of_memory(fmt::format("{}: no memory for a page table of {} pages", verb, pages.size()));
    }
    ++next_id;
    for (const std::int32_t page : pages) CA_RETURN_IF_ERROR(allocator.retain(page));
    return id;
  }

  Status out_of_pages(RequestId id, const Request& request, std::int32_t tokens, std::int32_t needed,
                      bool copies_tail) const {
    const std::int32_t num_free = allocator.num_free();
    // The rest of the last page is room too, unless the page must be copied first and nothing is free for that.
    const std::int64_t pages = std::int64_t{pages_for(request.length)} + num_free - (copies_tail ? 1 : 0);
    const std::int64_t room = copies_tail && num_free == 0 ? 0 : pages * page_tokens - std::int64_t{request.length};
    return out_of_memory(fmt::format(
        "extend: request {} needs {} more pages for {} more tokens{}; {} of {} pages of {} tokens are free, room for "
        "{} more tokens",
        id, needed, tokens, copies_tail ? " (one to copy its shared last page)" : "", num_free, allocator.num_pages(),
        page_tokens, room));
  }

  Status check_extend(RequestId id, const Request& request, std::int32_t tokens) const {
    if (tokens < 0) return invalid_argument(fmt::format("extend: {} tokens; allowed: 0 or more", tokens));
    if (tokens > max_context() - request.length) {
      return invalid_argument(fmt::format("extend: request {} of {} tokens by {}; a context holds at most {}", id,
                                          request.length, tokens, max_context()));
    }
    return {};
  }
};

PageTables::PageTables(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
PageTables::PageTables(PageTables&&) noexcept = default;
PageTables& PageTables::operator=(PageTables&&) noexcept = default;
PageTables::~PageTables() = default;

Result<PageTables> PageTables::create(std::int32_t num_pages, std::int32_t page_tokens) {
  if (num_pages < 1 || page_tokens < 1) {
    return invalid_argument(
        fmt::format("page tables: {} pages of {} tokens; allowed: 1 or more of both", num_pages, page_tokens));
  }
  try {
    return PageTables(std::make_unique<Impl>(num_pages, page_tokens));
  } catch (const std::bad_alloc&) {
    return out_of_memory(fmt::format("page tables: no memory for the free list of {} pages", num_pages));
  }
}

std::int32_t PageTables::page_tokens() const noexcept { return impl_->page_tokens; }
std::int32_t PageTables::num_pages() const noexcept { return impl_->allocator.num_pages(); }
std::int32_t PageTables::num_free_pages() const noexcept { return impl_->allocator.num_free(); }
std::int64_t PageTables::num_requests() const noexcept { return std::ssize(impl_->requests); }

std::int32_t PageTables::num_holders(std::int32_t page) const noexcept {
  return page < 0 || page >= num_pages() ? 0 : impl_->allocator.num_holders(page);
}

Result<RequestId> PageTables::add_request(std::span<const std::int32_t> prefix_pages) {
  const std::int64_t tokens = std::ssize(prefix_pages) * std::int64_t{impl_->page_tokens};
  if (tokens > impl_->max_context()) {
    return invalid_argument(
        fmt::format("add_request: a prefix of {} tokens; a context holds at most {}", tokens, impl_->max_context()));
  }
  for (const std::int32_t page : prefix_pages) {
    if (num_holders(page) == 0) {
      return invalid_argument(fmt::format("add_request: page {} of the prefix; allowed: pages that are held", page));
    }
  }
  return impl_->share("add_request", prefix_pages, static_cast<std::int32_t>(tokens));
}

Result<RequestId> PageTables::fork(RequestId parent, std::int32_t tokens) {
  CA_ASSIGN_OR_RETURN(const Request* from, impl_->find("fork", parent));
  if (tokens < 0 || tokens > from->length) {
    return invalid_argument(
        fmt::format("fork: {} tokens of request {}; allowed: 0 to its length {}", tokens, parent, from->length));
  }
  return impl_->share("fork", std::span(from->pages).first(static_cast<std::size_t>(impl_->pages_for(tokens))), tokens);
}

Status PageTables::truncate(RequestId id, std::int32_t tokens) {
  CA_ASSIGN_OR_RETURN(Request * request, impl_->find("truncate", id));
  if (tokens < 0 || tokens > request->length) {
    return invalid_argument(
        fmt::format("truncate: {} tokens of request {}; allowed: 0 to its length {}", tokens, id, request->length));
  }
  CA_RETURN_IF_ERROR(impl_->drop_from(*request, static_cast<std::size_t>(impl_->pages_for(tokens))));
  request->length = tokens;
  return {};
}

Status PageTables::release(RequestId id) {
  CA_ASSIGN_OR_RETURN(Request * request, impl_->find("release", id));
  CA_RETURN_IF_ERROR(impl_->drop_from(*request, 0));
  impl_->requests.erase(id);
  return {};
}

Result<std::int32_t> PageTables::pages_to_extend(RequestId id, std::int32_t tokens, bool replace_shared_tail) const {
  CA_ASSIGN_OR_RETURN(const Request* request, impl_->find("extend", id));
  CA_RETURN_IF_ERROR(impl_->check_extend(id, *request, tokens));
  if (tokens == 0) return 0;
  return impl_->pages_for(request->length + tokens) - impl_->pages_for(request->length) +
         (replace_shared_tail && impl_->tail_shared(*request) ? 1 : 0);
}

Result<PageExtension> PageTables::extend(RequestId id, std::int32_t tokens, bool replace_shared_tail) {
  CA_ASSIGN_OR_RETURN(Request * request, impl_->find("extend", id));
  CA_ASSIGN_OR_RETURN(const std::int32_t needed, pages_to_extend(id, tokens, replace_shared_tail));
  PageExtension extension{.first_new = static_cast<std::int32_t>(request->pages.size())};
  if (tokens == 0) return extension;
  const bool replaces = replace_shared_tail && impl_->tail_shared(*request);
  if (needed > impl_->allocator.num_free()) return impl_->out_of_pages(id, *request, tokens, needed, replaces);

  std::vector<std::int32_t> pages;
  try {
    pages.resize(static_cast<std::size_t>(needed));
    request->pages.reserve(request->pages.size() + pages.size());
  } catch (const std::bad_alloc&) {
    return out_of_memory(fmt::format("extend: no memory for {} entries of the page table of request {}", needed, id));
  }
  if (!impl_->allocator.allocate(pages)) return internal_error("extend: free pages vanished");
  if (replaces) {
    extension = {extension.first_new - 1, request->pages.back()};
    CA_RETURN_IF_ERROR(drop(request->pages.back()));
    request->pages.pop_back();
  }
  request->pages.insert(request->pages.end(), pages.begin(), pages.end());
  request->length += tokens;
  return extension;
}

Status PageTables::hold(std::int32_t page) { return impl_->allocator.retain(page); }
Status PageTables::drop(std::int32_t page) { return impl_->allocator.release(page).status(); }

Result<std::int32_t> PageTables::length(RequestId id) const {
  CA_ASSIGN_OR_RETURN(const Request* request, impl_->find("length", id));
  return request->length;
}

Result<std::span<const std::int32_t>> PageTables::page_table(RequestId id) const {
  CA_ASSIGN_OR_RETURN(const Request* request, impl_->find("page_table", id));
  return std::span<const std::int32_t>(request->pages);
}

}  // namespace compact
