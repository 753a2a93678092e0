// Who may write a page. Everything below relies on it:
//
//   A page has at most one *writer*, a request whose record of it (count, mean, running sums) is live; every other
//   holder keeps a prefix of the page that is not written again. A request is not the writer of its incomplete last
//   page if the page came with a fork, or was shared when `truncate` cut it: the record then describes the tokens of
//   somebody else, and the request is marked `tail_stale`. Its next `extend` resolves the mark: it copies the tokens
//   that it keeps to a page of its own if others still hold the page, else takes the page over, and rebuilds the
//   record from those tokens in either case.
//
// So fork and truncate never need a page and cannot run out of memory, `write` never copies, and a stale record is
// read by nobody: selectors use complete pages only, and the holders of a complete page all agree on its tokens.
#include "compact/paged_kv.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

#include "src/kv/page_allocator.h"
#include "src/kv/page_store.h"

namespace compact {
namespace {

// Elements of K below which waking the threads costs more than the copy.
constexpr std::int64_t kSerialElements = 32 * 1024;

struct Request {
  std::int32_t length = 0;            // tokens that there is room for
  std::vector<std::int32_t> pages;    // [ceil(length / P)]  physical, in logical order
  std::vector<std::int32_t> written;  // [num_layers]  tokens stored so far, at most length
  // [num_layers, Hkv, PageStore::sum_floats]  of the page that the layer's next token goes to
  std::unique_ptr<float[]> open_sums;
  bool tail_stale = false;  // see the top of this file
};

// Part of a write that falls into one page.
struct PagePart {
  std::int32_t page;         // physical
  std::int32_t first_token;  // in the page
  std::int32_t tokens;
  std::int32_t first_row;  // in the written rows
};

Status check_rows(const char* name, const ConstRows& rows, const PagedKvOptions& options) {
  if (rows.tokens < 0) return invalid_argument(fmt::format("write: {} has {} tokens", name, rows.tokens));
  if (rows.heads != options.num_kv_heads || rows.head_dim != options.head_dim) {
    return invalid_argument(fmt::format("write: {} is [{}, {}, {}]; the cache takes [tokens, {}, {}]", name,
                                        rows.tokens, rows.heads, rows.head_dim, options.num_kv_heads,
                                        options.head_dim));
  }
  if (rows.tokens > 0 && rows.data == nullptr) return invalid_argument(fmt::format("write: {} is null", name));
  return {};
}

}  // namespace

struct PagedKvCache::Impl {
  PageStore store;
  PageAllocator allocator;
  std::unordered_map<RequestId, Request> requests;
  RequestId next_id = 0;
  std::vector<float> scratch_sums;  // [threads, sum_floats]  of pages that one write fills from start to end

  explicit Impl(PageStore pages) : store(std::move(pages)), allocator(store.options().num_pages) {}

  const PagedKvOptions& options() const { return store.options(); }

  std::int32_t pages_for(std::int32_t tokens) const {
    return static_cast<std::int32_t>((std::int64_t{tokens} + options().page_tokens - 1) / options().page_tokens);
  }
  // Whole pages below 2^31, so that a context rounded up to pages is an int32 everywhere.
  std::int32_t max_context() const { return std::numeric_limits<std::int32_t>::max() - (options().page_tokens - 1); }

  std::int64_t open_sum_floats() const {
    return std::int64_t{options().num_layers} * options().num_kv_heads * store.sum_floats();
  }
  float* open_sums(const Request& request, std::int32_t layer, std::int32_t head) const {
    const std::int64_t slot = std::int64_t{layer} * options().num_kv_heads + head;
    return request.open_sums.get() + slot * store.sum_floats();  // null plus 0 without sums
  }

  Result<Request*> find(const char* verb, RequestId id) {
    const auto found = requests.find(id);
    if (found == requests.end()) return invalid_argument(fmt::format("{}: unknown request {}", verb, id));
    return &found->second;
  }

  // A free page counts 0 tokens in every layer: a record never outlives the tokens that it describes.
  Status drop_page(std::int32_t page) {
    CA_ASSIGN_OR_RETURN(const bool now_free, allocator.release(page));
    if (!now_free) return {};
    for (std::int32_t layer = 0; layer < options().num_layers; ++layer) store.count(layer, page) = 0;
    return {};
  }

  bool tail_shared(const Request& request) const { return allocator.num_holders(request.pages.back()) > 1; }

  // Tokens of the request's last page that `layer` has stored.
  std::int32_t tail_tokens(const Request& request, std::int32_t layer) const {
    const std::int32_t page_tokens = options().page_tokens;
    const std::int32_t tail_begin = (pages_for(request.length) - 1) * page_tokens;
    return std::clamp(request.written[static_cast<std::size_t>(layer)] - tail_begin, 0, page_tokens);
  }

  void copy_tail(const Request& request, std::int32_t to_page) {
    for (std::int32_t layer = 0; layer < options().num_layers; ++layer) {
      store.copy_tokens(layer, request.pages.back(), to_page, tail_tokens(request, layer));
    }
  }

  // Recomputes the record of the last page from the tokens that the request keeps in it.
  void rebuild_tail(Request& request) {
    const std::int32_t page = request.pages.back();
    for (std::int32_t layer = 0; layer < options().num_layers; ++layer) {
      const std::int32_t tokens = tail_tokens(request, layer);
      store.count(layer, page) = tokens;
      // A layer that has not reached this page still needs its running sums for an earlier one.
      if (tokens == 0) continue;
      for (std::int32_t head = 0; head < options().num_kv_heads; ++head) {
        store.continue_record(layer, page, head, 0, tokens, open_sums(request, layer, head));
      }
    }
    request.tail_stale = false;
  }

  Status out_of_pages(RequestId id, const Request& request, std::int32_t tokens, std::int32_t needed,
                      bool copies_tail) const {
    const std::int32_t num_free = allocator.num_free();
    // The rest of the last page is room too, unless the page must be copied first and nothing is free for that.
    const std::int64_t pages = std::int64_t{pages_for(request.length)} + num_free - (copies_tail ? 1 : 0);
    const std::int64_t room =
        copies_tail && num_free == 0 ? 0 : pages * options().page_tokens - std::int64_t{request.length};
    return out_of_memory(fmt::format(
        "extend: request {} needs {} more pages for {} more tokens{}; {} of {} pages of {} tokens are free, room for "
        "{} more tokens",
        id, needed, tokens, copies_tail ? " (one to copy its shared last page)" : "", num_free, options().num_pages,
        options().page_tokens, room));
  }

  Status check_write(RequestId id, const Request& request, std::int32_t layer, std::int32_t first_position,
                     const ConstRows& k, const ConstRows& v, const ConstRows& k_pre) const {
    if (layer < 0 || layer >= options().num_layers) {
      return invalid_argument(fmt::format("write: layer is {}; allowed: 0 to {}", layer, options().num_layers - 1));
    }
    CA_RETURN_IF_ERROR(check_rows("K", k, options()));
    CA_RETURN_IF_ERROR(check_rows("V", v, options()));
    if (k.tokens != v.tokens) {
      return invalid_argument(fmt::format("write: K has {} tokens and V has {}", k.tokens, v.tokens));
    }
    if (options().summaries.gate_pool) {
      CA_RETURN_IF_ERROR(check_rows("K before RoPE", k_pre, options()));
      if (k_pre.tokens != k.tokens) {
        return invalid_argument(fmt::format("write: K has {} tokens and K before RoPE, which gate pools need, has {}",
                                            k.tokens, k_pre.tokens));
      }
    }
    const std::int32_t next = request.written[static_cast<std::size_t>(layer)];
    if (first_position != next) {
      return invalid_argument(fmt::format("write: position {} of request {} in layer {} is {}; the next is {}",
                                          first_position, id, layer,
                                          first_position < next ? "written already" : "past a gap", next));
    }
    const std::int64_t end = std::int64_t{first_position} + k.tokens;
    if (end > request.length) {
      return invalid_argument(fmt::format("write: tokens {} to {} of request {} pass its length {}; extend it first",
                                          first_position, end, id, request.length));
    }
    return {};
  }

  // Keys before RoPE are not stored, so the pool of a cut block could not be made again.
  Status check_gate_edge(const char* verb, RequestId id, std::int32_t tokens) const {
    if (!options().summaries.gate_pool || tokens % kGateBlockTokens == 0) return {};
    return unsupported(fmt::format("{}: {} tokens of request {} in a cache with gate pools; allowed: multiples of {}",
                                   verb, tokens, id, kGateBlockTokens));
  }

  PagePart part(const Request& request, std::int32_t first_position, std::int32_t tokens, std::int32_t page_idx) const {
    const std::int32_t page_begin = page_idx * options().page_tokens;
    const std::int32_t begin = std::max(first_position, page_begin);
    // Not page_begin + P, which may be 2^31.
    const std::int32_t count = std::min(options().page_tokens - (begin - page_begin), first_position + tokens - begin);
    return {.page = request.pages[static_cast<std::size_t>(page_idx)],
            .first_token = begin - page_begin,
            .tokens = count,
            .first_row = begin - first_position};
  }
};

PagedKvCache::PagedKvCache(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
PagedKvCache::PagedKvCache(PagedKvCache&&) noexcept = default;
PagedKvCache& PagedKvCache::operator=(PagedKvCache&&) noexcept = default;
PagedKvCache::~PagedKvCache() = default;

Result<PagedKvCache> PagedKvCache::create(const PagedKvOptions& options) {
  CA_ASSIGN_OR_RETURN(PageStore store, PageStore::create(options));
  try {
    return PagedKvCache(std::make_unique<Impl>(std::move(store)));
  } catch (const std::bad_alloc&) {
    return out_of_memory(fmt::format("create: no memory for the free list of {} pages", options.num_pages));
  }
}

Result<std::int64_t> PagedKvCache::record_bytes(const PagedKvOptions& options) {
  return PageStore::planned_record_bytes(options);
}

const PagedKvOptions& PagedKvCache::options() const noexcept { return impl_->options(); }
std::int32_t PagedKvCache::num_free_pages() const noexcept { return impl_->allocator.num_free(); }
std::int64_t PagedKvCache::kv_bytes() const noexcept { return impl_->store.kv_bytes(); }

std::int64_t PagedKvCache::summary_bytes() const noexcept {
  std::int64_t num_open = 0;
  for (const auto& [id, request] : impl_->requests) num_open += request.open_sums != nullptr ? 1 : 0;
  return impl_->store.record_bytes() + num_open * impl_->open_sum_floats() * std::int64_t{sizeof(float)};
}

RequestId PagedKvCache::add_request() {
  const RequestId id = impl_->next_id++;
  impl_->requests[id].written.assign(static_cast<std::size_t>(impl_->options().num_layers), 0);
  return id;
}

Result<RequestId> PagedKvCache::fork(RequestId parent, std::int32_t tokens) {
  CA_ASSIGN_OR_RETURN(const Request* from, impl_->find("fork", parent));
  const std::int32_t written = *std::min_element(from->written.begin(), from->written.end());
  if (tokens < 0 || tokens > written) {
    return invalid_argument(fmt::format("fork: {} tokens of request {}; allowed: 0 to {}, what every layer has written",
                                        tokens, parent, written));
  }
  CA_RETURN_IF_ERROR(impl_->check_gate_edge("fork", parent, tokens));
  const std::int32_t num_pages = impl_->pages_for(tokens);
  const RequestId id = impl_->next_id;
  try {
    Request& child = impl_->requests[id];
    child.length = tokens;
    child.pages.assign(from->pages.begin(), from->pages.begin() + num_pages);
    child.written.assign(from->written.size(), tokens);
    child.tail_stale = tokens % impl_->options().page_tokens != 0;
  } catch (const std::bad_alloc&) {
    impl_->requests.erase(id);
    return out_of_memory(fmt::format("fork: no memory for a page table of {} pages", num_pages));
  }
  ++impl_->next_id;
  for (std::int32_t i = 0; i < num_pages; ++i) {
    CA_RETURN_IF_ERROR(impl_->allocator.retain(from->pages[static_cast<std::size_t>(i)]));
  }
  return id;
}

Status PagedKvCache::truncate(RequestId id, std::int32_t tokens) {
  CA_ASSIGN_OR_RETURN(Request * request, impl_->find("truncate", id));
  if (tokens < 0 || tokens > request->length) {
    return invalid_argument(
        fmt::format("truncate: {} tokens of request {}; allowed: 0 to its length {}", tokens, id, request->length));
  }
  if (tokens == request->length) return {};
  CA_RETURN_IF_ERROR(impl_->check_gate_edge("truncate", id, tokens));

  const auto num_pages = static_cast<std::size_t>(impl_->pages_for(tokens));
  while (request->pages.size() > num_pages) {
    CA_RETURN_IF_ERROR(impl_->drop_page(request->pages.back()));
    request->pages.pop_back();
  }
  request->length = tokens;
  bool cut = false;
  for (std::int32_t& written : request->written) {
    cut = cut || written > tokens;
    written = std::min(written, tokens);
  }
  const bool incomplete = tokens % impl_->options().page_tokens != 0;
  request->tail_stale = incomplete && (cut || request->tail_stale);
  const bool has_sums = request->open_sums != nullptr || impl_->open_sum_floats() == 0;  // else extend makes them
  if (request->tail_stale && has_sums && !impl_->tail_shared(*request)) {
    impl_->rebuild_tail(*request);
  }
  return {};
}

Status PagedKvCache::release(RequestId id) {
  CA_ASSIGN_OR_RETURN(Request * request, impl_->find("release", id));
  // From the back, so that the free list hands the pages out again in logical order.
  while (!request->pages.empty()) {
    CA_RETURN_IF_ERROR(impl_->drop_page(request->pages.back()));
    request->pages.pop_back();
  }
  impl_->requests.erase(id);
  return {};
}

Status PagedKvCache::extend(RequestId id, std::int32_t tokens) {
  CA_ASSIGN_OR_RETURN(Request * request, impl_->find("extend", id));
  if (tokens < 0) return invalid_argument(fmt::format("extend: {} tokens; allowed: 0 or more", tokens));
  if (tokens > impl_->max_context() - request->length) {
    return invalid_argument(fmt::format("extend: request {} of {} tokens by {}; a context holds at most {}", id,
                                        request->length, tokens, impl_->max_context()));
  }
  if (tokens == 0) return {};

  const bool copies_tail = request->tail_stale && impl_->tail_shared(*request);
  const std::int32_t needed =
      impl_->pages_for(request->length + tokens) - impl_->pages_for(request->length) + (copies_tail ? 1 : 0);
  if (needed > impl_->allocator.num_free()) {
    return impl_->out_of_pages(id, *request, tokens, needed, copies_tail);
  }

  // Everything that may fail for lack of memory comes before the first change.
  std::vector<std::int32_t> pages;
  try {
    pages.resize(static_cast<std::size_t>(needed));
    request->pages.reserve(request->pages.size() + pages.size());
    if (request->open_sums == nullptr && impl_->open_sum_floats() > 0) {
      request->open_sums.reset(new float[static_cast<std::size_t>(impl_->open_sum_floats())]);
    }
  } catch (const std::bad_alloc&) {
    return out_of_memory(fmt::format("extend: no memory for the {} bytes of request {}'s running sums",
                                     impl_->open_sum_floats() * std::int64_t{sizeof(float)}, id));
  }
  if (!impl_->allocator.allocate(pages)) return internal_error("extend: free pages vanished");

  auto fresh = pages.cbegin();
  if (copies_tail) {
    impl_->copy_tail(*request, *fresh);
    CA_RETURN_IF_ERROR(impl_->drop_page(request->pages.back()));
    request->pages.back() = *fresh++;
  }
  if (request->tail_stale) impl_->rebuild_tail(*request);
  request->pages.insert(request->pages.end(), fresh, pages.cend());
  request->length += tokens;
  return {};
}

Status PagedKvCache::write(RequestId id, std::int32_t layer, std::int32_t first_position, ConstRows k, ConstRows v,
                           ThreadPool& pool, ConstRows k_pre) {
  CA_ASSIGN_OR_RETURN(Request * request, impl_->find("write", id));
  CA_RETURN_IF_ERROR(impl_->check_write(id, *request, layer, first_position, k, v, k_pre));
  if (k.tokens == 0) return {};

  const PageStore& store = impl_->store;
  const std::int32_t page_tokens = store.options().page_tokens;
  const std::int32_t first_page = first_position / page_tokens;
  const std::int32_t last_page = (first_position + k.tokens - 1) / page_tokens;
  const PagePart first = impl_->part(*request, first_position, k.tokens, first_page);
  if (store.count(layer, first.page) != first.first_token) {
    return internal_error(fmt::format("write: page {} counts {} tokens in layer {}, not {}", first.page,
                                      store.count(layer, first.page), layer, first.first_token));
  }
  try {
    impl_->scratch_sums.resize(static_cast<std::size_t>(pool.num_threads() * store.sum_floats()));
  } catch (const std::bad_alloc&) {
    return out_of_memory("write: no memory for the running sums of the threads");
  }

  const auto store_part = [&](const PagePart& part, std::int32_t head, float* sums) {
    store.store(layer, part.page, head, part.first_token, part.tokens, k, v, k_pre, part.first_row, sums);
  };
  // One item per (head, page), except that the first and the last page of a head are one item: the first continues
  // the running sums that the last replaces. The pages between them are filled whole and leave no sums behind.
  const std::int32_t items_per_head = std::max(1, last_page - first_page);
  const auto run_item = [&](std::int64_t item, std::int32_t thread) {
    const auto head = static_cast<std::int32_t>(item / items_per_head);
    const auto idx = static_cast<std::int32_t>(item % items_per_head);
    if (idx > 0) {
      store_part(impl_->part(*request, first_position, k.tokens, first_page + idx), head,
                 impl_->scratch_sums.data() + thread * store.sum_floats());
      return;
    }
    float* open_sums = impl_->open_sums(*request, layer, head);
    store_part(first, head, open_sums);
    if (last_page > first_page) {
      store_part(impl_->part(*request, first_position, k.tokens, last_page), head, open_sums);
    }
  };
  const std::int64_t num_items = std::int64_t{store.options().num_kv_heads} * items_per_head;
  const std::int64_t elements = std::int64_t{k.tokens} * k.heads * k.head_dim;
  if (elements < kSerialElements) {
    for (std::int64_t item = 0; item < num_items; ++item) run_item(item, 0);
  } else {
    pool.parallel_for(num_items, run_item);
  }

  for (std::int32_t page_idx = first_page; page_idx <= last_page; ++page_idx) {
    const PagePart part = impl_->part(*request, first_position, k.tokens, page_idx);
    store.count(layer, part.page) = part.first_token + part.tokens;
  }
  request->written[static_cast<std::size_t>(layer)] = first_position + k.tokens;
  return {};
}

Result<std::int32_t> PagedKvCache::length(RequestId id) const {
  CA_ASSIGN_OR_RETURN(const Request* request, impl_->find("length", id));
  return request->length;
}

Result<std::span<const std::int32_t>> PagedKvCache::page_table(RequestId id) const {
  CA_ASSIGN_OR_RETURN(const Request* request, impl_->find("page_table", id));
  return std::span<const std::int32_t>(request->pages);
}

PagedKvView PagedKvCache::layer(std::int32_t layer) const noexcept {
  if (layer < 0 || layer >= impl_->options().num_layers) return {};
  return impl_->store.kv(layer);
}

PageSummaryView PagedKvCache::summaries(std::int32_t layer) const noexcept {
  if (layer < 0 || layer >= impl_->options().num_layers) return {};
  return impl_->store.summaries(layer);
}

}  // namespace compact
