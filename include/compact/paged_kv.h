/// Paged KV cache: page allocator with reference counts, a page table per request, K and V of every layer in
/// pages, and page summaries that are written at append and never recomputed from the context.
///
/// One page table serves all layers. A chunk is appended in two steps: `extend` gives the request room for its
/// tokens (all layers at once, all or nothing), then `write` stores K and V layer by layer. A chunk may start and
/// end anywhere in a page. Thread safety: none; one owner calls, `write` uses the pool inside.
/// Source of the summaries: docs/design/method.md section 2 (page means: FlashPrefill, arXiv 2603.06199; gate pools:
/// SeerAttention, arXiv 2410.13276; coherence: SpargeAttn, arXiv 2502.18137).
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "compact/page_tables.h"
#include "compact/status.h"
#include "compact/tensor_view.h"
#include "compact/thread_pool.h"

namespace compact {

enum class KvLayout : std::int32_t {
  kHnd = 0,  ///< [num_pages, Hkv, P, D]: the tokens of a head are contiguous; the CPU kernel's favourite
  kNhd = 1,  ///< [num_pages, P, Hkv, D]
};

struct PagedKvOptions {
  std::int32_t num_layers = 0;
  std::int32_t num_kv_heads = 0;   // Hkv
  std::int32_t head_dim = 0;       // D
  std::int32_t page_tokens = 128;  // P: power of two, 16..256
  std::int32_t num_pages = 0;      // pages shared by all requests
  DType dtype = DType::kF32;
  KvLayout layout = KvLayout::kHnd;
  SummaryFields summaries{.mean_k = true};  // what the selectors in use need
};

class PagedKvCache {
 public:
  /// Allocates the cache. Errors: kInvalidArgument (a size or P out of range), kOutOfMemory (says how many bytes).
  [[nodiscard]] static Result<PagedKvCache> create(const PagedKvOptions& options);

  PagedKvCache(PagedKvCache&&) noexcept;
  PagedKvCache& operator=(PagedKvCache&&) noexcept;
  ~PagedKvCache();

  [[nodiscard]] const PagedKvOptions& options() const noexcept;
  [[nodiscard]] std::int32_t num_free_pages() const noexcept { return tables().num_free_pages(); }
  /// Whose pages are whose.
  [[nodiscard]] const PageTables& tables() const noexcept;
  /// Bytes of K and V, and of summaries with their running sums, over all layers.
  [[nodiscard]] std::int64_t kv_bytes() const noexcept;
  [[nodiscard]] std::int64_t summary_bytes() const noexcept;

  /// A request with no tokens.
  [[nodiscard]] RequestId add_request();

  /// A request whose first tokens are those of `prefix_pages`, in logical order: a prefix that others have computed.
  /// Needs no free page. Errors: kInvalidArgument (a page that nobody holds, or that is not complete in every layer),
  /// kOutOfMemory.
  [[nodiscard]] Result<RequestId> add_request(std::span<const std::int32_t> prefix_pages);

  /// One more holder of a page, and one fewer: pages outlive their requests while somebody holds them. Errors:
  /// kInternal (a page that nobody holds).
  [[nodiscard]] Status hold_page(std::int32_t page);
  [[nodiscard]] Status drop_page(std::int32_t page);

  /// A new request that shares the first `tokens` tokens of `parent`. Complete pages are shared for good. If `tokens`
  /// ends inside a page, that page is copied with its summary by the child's next `extend`, or taken over if nobody
  /// else holds it by then; the parent's writes never reach the child. Needs no free page. Errors: kInvalidArgument
  /// (unknown parent; more tokens than the parent has written in every layer), kUnsupported (gate pools, and tokens not
  /// a multiple of 64), kOutOfMemory.
  [[nodiscard]] Result<RequestId> fork(RequestId parent, std::int32_t tokens);

  /// Drops the tokens from `tokens` on (a rejected draft, a rolled-back chunk). Freed pages return to the pool.
  /// Errors: kInvalidArgument (unknown request, tokens outside [0, length]), kUnsupported (as in `fork`, if any of the
  /// tokens dropped was written).
  [[nodiscard]] Status truncate(RequestId request, std::int32_t tokens);

  /// Forgets the request; pages that nobody else holds return to the pool.
  [[nodiscard]] Status release(RequestId request);

  /// Makes room for `tokens` more tokens. Either all pages are had or nothing changes. Needs one page more if the last
  /// page is shared and incomplete.
  /// Errors: kOutOfMemory (says pages needed and free), kInvalidArgument (unknown request, negative count, a context
  /// past 2^31 - P tokens).
  [[nodiscard]] Status extend(RequestId request, std::int32_t tokens);

  /// Stores K and V (post-RoPE) of the tokens [first_position, first_position + k.tokens) in one layer, rounds them
  /// to the cache's dtype and continues the summaries from the values as stored. k and v: [tokens, Hkv, D]; k_pre: K
  /// before RoPE, the same shape, read by gate pools only.
  /// Errors: kInvalidArgument if the layer's next position is not first_position (a gap or a second write), if the
  /// tokens pass the request's length, or if a shape differs from the cache's.
  [[nodiscard]] Status write(RequestId request, std::int32_t layer, std::int32_t first_position, ConstRows k,
                             ConstRows v, ThreadPool& pool, ConstRows k_pre = {});

  /// Bytes of the records (all layers, running sums of open requests excluded) that a cache of these options keeps, for
  /// choosing before making one. Errors: those of `create`, which is not called.
  [[nodiscard]] static Result<std::int64_t> record_bytes(const PagedKvOptions& options);

  /// Tokens that the request has room for; what `write` may reach.
  [[nodiscard]] Result<std::int32_t> length(RequestId request) const;

  /// Physical pages in logical order, [ceil(length / P)]. Valid until the next call that is not const.
  [[nodiscard]] Result<std::span<const std::int32_t>> page_table(RequestId request) const;

  /// An empty view for a layer out of range.
  [[nodiscard]] PagedKvView layer(std::int32_t layer) const noexcept;
  /// A field is null when the cache was made without it. The record of a page that two requests share and that is
  /// incomplete may describe the other's tokens until the next `extend`: use complete pages only.
  [[nodiscard]] PageSummaryView summaries(std::int32_t layer) const noexcept;

 private:
  struct Impl;
  explicit PagedKvCache(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace compact
