/// Memory of the physical pages of all layers: K, V and the page's record (summaries and count). Knows pages, tokens
/// within a page and heads; which request owns a page is the business of paged_kv.cc.
#pragma once

#include <array>
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

  /// What record_bytes() would be; the same errors.
  [[nodiscard]] static Result<std::int64_t> planned_record_bytes(const PagedKvOptions& options);

  [[nodiscard]] const PagedKvOptions& options() const noexcept { return options_; }
  [[nodiscard]] std::int64_t kv_bytes() const noexcept;      // K and V of all layers
  [[nodiscard]] std::int64_t record_bytes() const noexcept;  // summaries and counts of all layers

  /// Precondition of everything below: layer, page, head and tokens are in range.
  [[nodiscard]] PagedKvView kv(std::int32_t layer) const noexcept;
  [[nodiscard]] PageSummaryView summaries(std::int32_t layer) const noexcept;
  [[nodiscard]] std::int32_t& count(std::int32_t layer, std::int32_t page) const noexcept {
    return counts(layer)[page];
  }

  /// Floats of the running sums of one (page, KV head): [P/w, D] each for keys, values and unit keys, [D] for the gate
  /// pool, as far as the summaries need them.
  [[nodiscard]] std::int64_t sum_floats() const noexcept { return sum_plan_.total; }

  /// Rounds rows [first_row, first_row + tokens) of k and v to the cache's dtype and stores them as the tokens of the
  /// page from first_token on. Then continues `sums` from the values as stored, and the gate pool from k_pre, and
  /// writes the record. Calls for different (page, head) may run at the same time. The count is the caller's to set.
  void store(std::int32_t layer, std::int32_t page, std::int32_t head, std::int32_t first_token, std::int32_t tokens,
             const ConstRows& k, const ConstRows& v, const ConstRows& k_pre, std::int32_t first_row,
             float* sums) const noexcept;

  /// Continues the record of one head, gate pool excluded, with tokens that the page holds already.
  void continue_record(std::int32_t layer, std::int32_t page, std::int32_t head, std::int32_t first_token,
                       std::int32_t tokens, float* sums) const noexcept;

  /// Copies K and V, and the gate pools of whole blocks, but no other record, of the first `tokens` tokens of a page,
  /// all heads.
  void copy_tokens(std::int32_t layer, std::int32_t from_page, std::int32_t to_page,
                   std::int32_t tokens) const noexcept;

 private:
  enum Field : std::size_t { kMeanK, kSubMeanK, kMeanV, kNormK, kCoherence, kGatePool, kNumFields };

  // Where the arrays lie in the one block.
  struct Plan {
    std::int64_t kv_layer_bytes = 0;                           // K of one layer; V the same; multiple of 64
    std::array<std::int64_t, kNumFields> field_layer_bytes{};  // multiples of 64; 0: not kept
    std::array<std::int64_t, kNumFields> field_begin{};        // bytes from the start of the block
    std::int64_t records_begin = 0;
    std::int64_t counts_begin = 0;
    std::int64_t total_bytes = 0;
  };
  // Where the running sums of one (page, KV head) lie, in floats; -1: not kept.
  struct SumPlan {
    std::int64_t keys = -1;
    std::int64_t values = -1;
    std::int64_t unit_keys = -1;
    std::int64_t gate = -1;
    std::int64_t total = 0;
  };
  static std::array<std::int64_t, kNumFields> field_floats(const PagedKvOptions& options) noexcept;
  static bool plan_block(const PagedKvOptions& options, Plan& plan) noexcept;
  static Result<Plan> checked_plan(const PagedKvOptions& options);
  static SumPlan plan_sums(const PagedKvOptions& options) noexcept;

  PageStore(const PagedKvOptions& options, const Plan& plan, LazyMemory block)
      : options_(options),
        plan_(plan),
        sum_plan_(plan_sums(options)),
        field_floats_(field_floats(options)),
        block_(std::move(block)) {}

  template <class T>
  void continue_typed(std::int32_t layer, std::int32_t page, std::int32_t head, std::int32_t first_token,
                      std::int32_t tokens, float* sums) const noexcept;

  [[nodiscard]] std::byte* k_bytes(std::int32_t layer) const noexcept {  // [num_pages, ...] in the layout's order
    return block_.get() + 2 * layer * plan_.kv_layer_bytes;
  }
  [[nodiscard]] std::byte* v_bytes(std::int32_t layer) const noexcept { return k_bytes(layer) + plan_.kv_layer_bytes; }
  [[nodiscard]] float* field(Field which, std::int32_t layer) const noexcept {  // [num_pages, Hkv, floats]; null: none
    if (plan_.field_layer_bytes[which] == 0) return nullptr;
    return reinterpret_cast<float*>(block_.get() + plan_.field_begin[which] + layer * plan_.field_layer_bytes[which]);
  }
  [[nodiscard]] float* record(Field which, std::int32_t layer, std::int32_t page, std::int32_t head) const noexcept {
    return field(which, layer) + (std::int64_t{page} * options_.num_kv_heads + head) * field_floats_[which];
  }
  [[nodiscard]] std::int32_t* counts(std::int32_t layer) const noexcept {  // [num_pages]
    return reinterpret_cast<std::int32_t*>(block_.get() + plan_.counts_begin) +
           std::int64_t{layer} * options_.num_pages;
  }

  PagedKvOptions options_;
  Plan plan_;
  SumPlan sum_plan_;
  std::array<std::int64_t, kNumFields> field_floats_;  // of one (page, KV head)
  LazyMemory block_;  // [num_layers][K, V], then each field [num_layers], then counts [num_layers]
};

}  // namespace compact
