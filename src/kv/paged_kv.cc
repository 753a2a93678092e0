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
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

#include "src/kv/page_store.h"

namespace compact {
namespace {

// Elements of K below which waking the threads costs more than the copy.
constexpr std::int64_t kSerialElements = 32 * 1024;

// What lies in a request's pages; which pages these are, PageTables knows.
struct Request {
  std::vector<std::int32_t> written;  // [num_layers]  tokens stored so far, at most the request's length
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
  PageTables tables;
  std::unordered_map<RequestId, Request> requests;
  std::vector<float> scratch_sums;  // [threads, sum_floats]  of pages that one write fills from start to end

  Impl(PageStore pages, PageTables books) : store(std::move(pages)), tables(std::move(books)) {}

  const PagedKvOptions& options() const { return store.options(); }

  std::int32_t pages_for(std::int32_t tokens) const {
    return static_cast<std::int32_t>((std::int64_t{tokens} + options().page_tokens - 1) / options().page_tokens);
  }

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
  void forget_free(std::span<const std::int32_t> pages) {
    for (const std::int32_t page : pages) {
      if (tables.num_holders(page) > 0) continue;
      for (std::int32_t layer = 0; layer < options().num_layers; ++layer) store.count(layer, page) = 0;
    }
  }

  Result<std::vector<std::int32_t>> pages_of(RequestId id) const {
    CA_ASSIGN_OR_RETURN(const std::span<const std::int32_t> pages, tables.page_table(id));
    return std::vector<std::int32_t>(pages.begin(), pages.end());
  }

  // Tokens of the request's last page, where its first `length` end, that `layer` has stored.
  std::int32_t tail_tokens(const Request& request, std::int32_t length, std::int32_t layer) const {
    const std::int32_t page_tokens = options().page_tokens;
    const std::int32_t tail_begin = (pages_for(length) - 1) * page_tokens;
    return std::clamp(request.written[static_cast<std::size_t>(layer)] - tail_begin, 0, page_tokens);
  }

  void copy_tail(const Request& request, std::int32_t length, std::int32_t from_page, std::int32_t to_page) {
    for (std::int32_t layer = 0; layer < options().num_layers; ++layer) {
      store.copy_tokens(layer, from_page, to_page, tail_tokens(request, length, layer));
    }
  }

  // Recomputes the record of `page`, where the request's first `length` tokens end, from the tokens that it keeps
  // there.
  void rebuild_tail(Request& request, std::int32_t length, std::int32_t page) {
    for (std::int32_t layer = 0; layer < options().num_layers; ++layer) {
      const std::int32_t tokens = tail_tokens(request, length, layer);
      store.count(layer, page) = tokens;
      // A layer that has not reached this page still needs its running sums for an earlier one.
      if (tokens == 0) continue;
      for (std::int32_t head = 0; head < options().num_kv_heads; ++head) {
        store.continue_record(layer, page, head, 0, tokens, open_sums(request, layer, head));
      }
    }
    request.tail_stale = false;
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
    CA_ASSIGN_OR_RETURN(const std::int32_t length, tables.length(id));
    if (end > length) {
      return invalid_argument(fmt::format("write: tokens {} to {} of request {} pass its length {}; extend it first",
                                          first_position, end, id, length));
    }
    return {};
  }

  // Keys before RoPE are not stored, so the pool of a cut block could not be made again.
  Status check_gate_edge(const char* verb, RequestId id, std::int32_t tokens) const {
    if (!options().summaries.gate_pool || tokens % kGateBlockTokens == 0) return {};
    return unsupported(fmt::format("{}: {} tokens of request {} in a cache with gate pools; allowed: multiples of {}",
                                   verb, tokens, id, kGateBlockTokens));
  }

  PagePart part(std::span<const std::int32_t> pages, std::int32_t first_position, std::int32_t tokens,
                std::int32_t page_idx) const {
    const std::int32_t page_begin = page_idx * options().page_tokens;
    const std::int32_t begin = std::max(first_position, page_begin);
    // Not page_begin + P, which may be 2^31.
    const std::int32_t count = std::min(options().page_tokens - (begin - page_begin), first_position + tokens - begin);
    return {.page = pages[static_cast<std::size_t>(page_idx)],
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
    CA_ASSIGN_OR_RETURN(PageTables tables, PageTables::create(options.num_pages, options.page_tokens));
    return PagedKvCache(std::make_unique<Impl>(std::move(store), std::move(tables)));
  } catch (const std::bad_alloc&) {
    return out_of_memory("create: no memory for the books of the cache");
  }
}

Result<std::int64_t> PagedKvCache::record_bytes(const PagedKvOptions& options) {
  return PageStore::planned_record_bytes(options);
}

const PagedKvOptions& PagedKvCache::options() const noexcept { return impl_->options(); }
const PageTables& PagedKvCache::tables() const noexcept { return impl_->tables; }
std::int64_t PagedKvCache::kv_bytes() const noexcept { return impl_->store.kv_bytes(); }

std::int64_t PagedKvCache::summary_bytes() const noexcept {
  std::int64_t num_open = 0;
  for (const auto& [id, request] : impl_->requests) num_open += request.open_sums != nullptr ? 1 : 0;
  return impl_->store.record_bytes() + num_open * impl_->open_sum_floats() * std::int64_t{sizeof(float)};
}

RequestId PagedKvCache::add_request() { return add_request({}).value(); }

Result<RequestId> PagedKvCache::add_request(std::span<const std::int32_t> prefix_pages) {
  const std::int32_t page_tokens = impl_->options().page_tokens;
  for (const std::int32_t page : prefix_pages) {
    for (std::int32_t layer = 0; impl_->tables.num_holders(page) > 0 && layer < impl_->options().num_layers; ++layer) {
      if (impl_->store.count(layer, page) == page_tokens) continue;
      return invalid_argument(fmt::format("add_request: page {} of the prefix has {} tokens in layer {}; allowed: {}",
                                          page, impl_->store.count(layer, page), layer, page_tokens));
    }
  }
  CA_ASSIGN_OR_RETURN(const RequestId id, impl_->tables.add_request(prefix_pages));
  const auto tokens = static_cast<std::int32_t>(std::ssize(prefix_pages) * page_tokens);
  impl_->requests[id].written.assign(static_cast<std::size_t>(impl_->options().num_layers), tokens);
  return id;
}

Status PagedKvCache::hold_page(std::int32_t page) { return impl_->tables.hold(page); }

Status PagedKvCache::drop_page(std::int32_t page) {
  CA_RETURN_IF_ERROR(impl_->tables.drop(page));
  impl_->forget_free(std::span(&page, 1));
  return {};
}

Result<RequestId> PagedKvCache::fork(RequestId parent, std::int32_t tokens) {
  CA_ASSIGN_OR_RETURN(const Request* from, impl_->find("fork", parent));
  const std::int32_t written = *std::min_element(from->written.begin(), from->written.end());
  if (tokens < 0 || tokens > written) {
    return invalid_argument(fmt::format("fork: {} tokens of request {}; allowed: 0 to {}, what every layer has written",
                                        tokens, parent, written));
  }
  CA_RETURN_IF_ERROR(impl_->check_gate_edge("fork", parent, tokens));
  CA_ASSIGN_OR_RETURN(const RequestId id, impl_->tables.fork(parent, tokens));
  Request& child = impl_->requests[id];
  child.written.assign(static_cast<std::size_t>(impl_->options().num_layers), tokens);
  child.tail_stale = tokens % impl_->options().page_tokens != 0;
  return id;
}

Status PagedKvCache::truncate(RequestId id, std::int32_t tokens) {
  CA_ASSIGN_OR_RETURN(Request * request, impl_->find("truncate", id));
  CA_ASSIGN_OR_RETURN(const std::int32_t length, impl_->tables.length(id));
  if (tokens == length) return {};
  const bool cut = *std::max_element(request->written.begin(), request->written.end()) > tokens;
  if (cut && tokens >= 0) CA_RETURN_IF_ERROR(impl_->check_gate_edge("truncate", id, tokens));
  CA_ASSIGN_OR_RETURN(const std::vector<std::int32_t> pages, impl_->pages_of(id));
  CA_RETURN_IF_ERROR(impl_->tables.truncate(id, tokens));
  impl_->forget_free(pages);

  for (std::int32_t& written : request->written) written = std::min(written, tokens);
  const bool incomplete = tokens % impl_->options().page_tokens != 0;
  request->tail_stale = incomplete && (cut || request->tail_stale);
  const bool has_sums = request->open_sums != nullptr || impl_->open_sum_floats() == 0;  // else extend makes them
  if (request->tail_stale && has_sums) {
    const std::int32_t tail = pages[static_cast<std::size_t>(impl_->pages_for(tokens)) - 1];
    if (impl_->tables.num_holders(tail) == 1) impl_->rebuild_tail(*request, tokens, tail);
  }
  return {};
}

Status PagedKvCache::release(RequestId id) {
  CA_RETURN_IF_ERROR(impl_->find("release", id).status());
  CA_ASSIGN_OR_RETURN(const std::vector<std::int32_t> pages, impl_->pages_of(id));
  CA_RETURN_IF_ERROR(impl_->tables.release(id));
  impl_->forget_free(pages);
  impl_->requests.erase(id);
  return {};
}

Status PagedKvCache::extend(RequestId id, std::int32_t tokens) {
  CA_ASSIGN_OR_RETURN(Request * request, impl_->find("extend", id));
  CA_ASSIGN_OR_RETURN(const std::int32_t length, impl_->tables.length(id));
  std::unique_ptr<float[]> sums;
  if (tokens > 0 && request->open_sums == nullptr && impl_->open_sum_floats() > 0) {
    sums.reset(new (std::nothrow) float[static_cast<std::size_t>(impl_->open_sum_floats())]);
    if (sums == nullptr) {
      return out_of_memory(fmt::format("extend: no memory for the {} bytes of request {}'s running sums",
                                       impl_->open_sum_floats() * std::int64_t{sizeof(float)}, id));
    }
  }
  CA_ASSIGN_OR_RETURN(const PageExtension extension, impl_->tables.extend(id, tokens, request->tail_stale));
  if (sums != nullptr) request->open_sums = std::move(sums);
  if (tokens == 0 || !request->tail_stale) return {};
  CA_ASSIGN_OR_RETURN(const std::span<const std::int32_t> pages, impl_->tables.page_table(id));
  const std::int32_t tail = pages[static_cast<std::size_t>(impl_->pages_for(length)) - 1];
  if (extension.replaced_page >= 0) impl_->copy_tail(*request, length, extension.replaced_page, tail);
  impl_->rebuild_tail(*request, length, tail);
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
  CA_ASSIGN_OR_RETURN(const std::span<const std::int32_t> pages, impl_->tables.page_table(id));
  const PagePart first = impl_->part(pages, first_position, k.tokens, first_page);
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
      store_part(impl_->part(pages, first_position, k.tokens, first_page + idx), head,
                 impl_->scratch_sums.data() + thread * store.sum_floats());
      return;
    }
    float* open_sums = impl_->open_sums(*request, layer, head);
    store_part(first, head, open_sums);
    if (last_page > first_page) {
      store_part(impl_->part(pages, first_position, k.tokens, last_page), head, open_sums);
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
    const PagePart part = impl_->part(pages, first_position, k.tokens, page_idx);
    store.count(layer, part.page) = part.first_token + part.tokens;
  }
  request->written[static_cast<std::size_t>(layer)] = first_position + k.tokens;
  return {};
}

Result<std::int32_t> PagedKvCache::length(RequestId id) const { return impl_->tables.length(id); }

Result<std::span<const std::int32_t>> PagedKvCache::page_table(RequestId id) const {
  return impl_->tables.page_table(id);
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
