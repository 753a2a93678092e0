/// What selectors share inside the library: input checks, the block length, one factory per selector.
#pragma once

#include <cstdint>
#include <memory>

#include "compact/selector.h"

namespace compact {

/// Rows of a full tile: tokens x heads. A tile of 128 x 128 scores is one step of the attention kernels too.
inline constexpr std::int32_t kTileRows = 128;

/// Largest power of two that is at most max_tokens and divides page_tokens, so that no query block straddles a page.
[[nodiscard]] std::int32_t block_tokens_within_page(std::int32_t max_tokens, std::int32_t page_tokens) noexcept;

/// Shapes of the step: P, positions, rows of Q. Does not look at page tables or summaries.
[[nodiscard]] Status check_select_input(const SelectInput& input);

/// check_select_input, and that nobody asks for scores, which the selector `who` has not.
[[nodiscard]] Status check_scoreless(const char* who, const SelectInput& input);

/// check_select_input, page tables, that the cache keeps the `needed` summaries, and that every past page has a summary
/// of exactly P tokens. `who` begins the message.
[[nodiscard]] Status check_summary_input(const char* who, const SelectInput& input, const SummaryFields& needed);

[[nodiscard]] std::unique_ptr<Selector> make_dense_selector();
[[nodiscard]] std::unique_ptr<Selector> make_static_selector();
/// Errors: kInvalidArgument (an option out of range).
[[nodiscard]] Result<std::unique_ptr<Selector>> make_mean_key_selector(const SelectorOptions& options);
[[nodiscard]] Result<std::unique_ptr<Selector>> make_oracle_selector(const SelectorOptions& options);
[[nodiscard]] Result<std::unique_ptr<Selector>> make_sub_mean_selector(const SelectorOptions& options);
[[nodiscard]] Result<std::unique_ptr<Selector>> make_xattention_selector(const SelectorOptions& options);
[[nodiscard]] Result<std::unique_ptr<Selector>> make_quoka_selector(const SelectorOptions& options);
[[nodiscard]] Result<std::unique_ptr<Selector>> make_random_selector(const SelectorOptions& options);
[[nodiscard]] Result<std::unique_ptr<Selector>> make_seer_selector(const SelectorOptions& options);
[[nodiscard]] Result<std::unique_ptr<Selector>> make_external_selector(const SelectorOptions& options);

}  // namespace compact
