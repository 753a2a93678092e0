/// Memory of the physical pages of all layers: K, V and the page's record (mean key and count). Knows pages, tokens
/// within a page and heads; which request owns a page is the business of paged_kv.cc.
#pragma once

#include <cstdint>

#include "compact/paged_kv.h"
#include "compact/status.h"
#include "compact/tensor_view.h"
#include "src/kv/lazy_memory.h"

namespace compact {

class PageStore {
 public:
  /// Checks the options and maps the memory, which costs nothing until it is touched.
  /// Errors: kInvalidArgument (an option out of range), kOutOfMemory (says how many bytes).
  [[nodiscard]] static Result<PageStore> create(const PagedKvOptions& options);

  [[nodiscard]] const PagedKvOptions& options() const noexcept { return options_; }
  [[nodiscard]] std::int64_t kv_bytes() const noexcept;      // K and V of all layers
  [[nodiscard]] std::int64_t record_bytes() const noexcept;  // means and counts of all layers

  /// Precondition of everything below: layer, page, head and tokens are in range.
  [[nodiscard]] PagedKvView kv(std::int32_t layer) const noexcept;
  [[nodiscard]] PageSummaryView summaries(std::int32_t layer) const noexcept;
  [[nodiscard]] std::int32_t& count(std::int32_t layer, std::int32_t page) const noexcept {
    return counts(layer)[page];
  }

  /// Floats of the running sums of one (page, KV head): [P/w, D]. 0 without page means.
  [[nodiscard]] std::int64_t sum_floats() const noexcept;

  /// Rounds rows [first_row, first_row + tokens) of k and v to the cache's dtype and stores them as the tokens of the
  /// page from first_token on. Then, with page means, continues `sums` [P/w, D] from the values as stored and writes
  /// the mean. Calls for different (page, head) may run at the same time. The count is the caller's to set.
  void store(std::int32_t layer, std::int32_t page, std::int32_t head, std::int32_t first_token, std::int32_t tokens,
             const ConstRows& k, const ConstRows& v, std::int32_t first_row, float* sums) const noexcept;

  /// Continues the record of one head with tokens that the page holds already.
  void continue_mean(std::int32_t layer, std::int32_t page, std::int32_t head, std::int32_t first_token,
                     std::int32_t tokens, float* sums) const noexcept;

  /// Copies K and V, not the record, of the first `tokens` tokens of a page, all heads.
  void copy_tokens(std::int32_t layer, std::int32_t from_page, std::int32_t to_page,
                   std::int32_t tokens) const noexcept;

 private:
  // Where the arrays lie in the one block.
  struct Plan {
    std::int64_t kv_layer_bytes = 0;    // K of one layer; V the same; multiple of 64
    std::int64_t mean_layer_bytes = 0;  // multiple of 64; 0 without page means
    std::int64_t means_begin = 0;       // bytes from the start of the block
    std::int64_t counts_begin = 0;
    std::int64_t total_bytes = 0;
  };
  static bool plan_block(const PagedKvOptions& options, Plan& plan) noexcept;

  PageStore(const PagedKvOptions& options, const Plan& plan, LazyMemory block)
      : options_(options), plan_(plan), block_(std::move(block)) {}

  [[nodiscard]] std::byte* k_bytes(std::int32_t layer) const noexcept {  // [num_pages, ...] in the layout's order
    return block_.get() + 2 * layer * plan_.kv_layer_bytes;
  }
  [[nodiscard]] std::byte* v_bytes(std::int32_t layer) const noexcept { return k_bytes(layer) + plan_.kv_layer_bytes; }
  [[nodiscard]] float* means(std::int32_t layer) const noexcept {  // [num_pages, Hkv, D]
    return reinterpret_cast<float*>(block_.get() + plan_.means_begin + layer * plan_.mean_layer_bytes);
  }
  [[nodiscard]] std::int32_t* counts(std::int32_t layer) const noexcept {  // [num_pages]
    return reinterpret_cast<std::int32_t*>(block_.get() + plan_.counts_begin) +
           std::int64_t{layer} * options_.num_pages;
  }

  PagedKvOptions options_;
  Plan plan_;
  LazyMemory block_;  // [num_layers][K, V], then means [num_layers], then counts [num_layers]
};

}  // namespace compact
