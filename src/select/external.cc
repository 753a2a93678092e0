// The selector that is told: masks, page lists or token lists that the caller passes with the step. Nothing is scored;
// everything is checked, and an entry out of range is an error with its place. Reference and CPU form are one.
#include <fmt/format.h>

#include <algorithm>
#include <bit>

#include "src/core/bit_words.h"
#include "src/select/selector.h"

namespace compact {
namespace {

Status check_shape(const SelectInput& input, const ExternalMask& external) {
  const bool tokens = external.form == ExternalMask::Form::kTokens;
  const bool shared = tokens && external.heads == 1;
  if (external.heads < 1 || (!shared && input.q.heads % external.heads != 0)) {
    return invalid_argument(fmt::format("external: {} heads for {} query heads; allowed: the query heads or KV heads{}",
                                        external.heads, input.q.heads, tokens ? ", or 1 for all" : ""));
  }
  if (external.block_tokens < 1 || !std::has_single_bit(static_cast<std::uint32_t>(external.block_tokens))) {
    return invalid_argument(
        fmt::format("external: block_tokens is {}; allowed: a power of two", external.block_tokens));
  }
  return {};
}

// Logical page of a physical one: the chunk's table read backwards.
std::int32_t logical_page(const ChunkView& chunk, std::int32_t num_pages, std::int32_t physical) {
  const std::int32_t* end = chunk.page_table + num_pages;
  const std::int32_t* found = std::find(chunk.page_table, end, physical);
  return found == end ? -1 : static_cast<std::int32_t>(found - chunk.page_table);
}

Status copy_words(const SelectInput& input, const ExternalMask& external, BlockMask& mask) {
  const auto num_blocks = static_cast<std::int64_t>(mask.blocks.size());
  const std::int64_t expected = std::int64_t{external.heads} * num_blocks * external.words_per_row;
  if (external.words_per_row < 0 || static_cast<std::int64_t>(external.words.size()) != expected) {
    return invalid_argument(fmt::format("external: {} words; expected {} heads x {} query blocks x {} words",
                                        external.words.size(), external.heads, num_blocks, external.words_per_row));
  }
  for (std::int32_t head = 0; head < external.heads; ++head) {
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(num_blocks); ++i) {
      const ChunkView& chunk = input.chunks[static_cast<std::size_t>(mask.blocks[static_cast<std::size_t>(i)].chunk)];
      const std::int32_t past_pages = chunk.num_past_pages(input.page_tokens);
      const std::uint64_t* row = external.words.data() + (head * num_blocks + i) * external.words_per_row;
      if (any_bit_from(row, external.words_per_row, past_pages)) {
        return invalid_argument(
            fmt::format("external: row (head {}, query block {}) names a page that is not past; "
                        "its chunk has {} past pages",
                        head, i, past_pages));
      }
      if (external.words_per_row < words_for_bits(past_pages)) {
        return invalid_argument(fmt::format("external: rows of {} words for {} past pages (query block {})",
                                            external.words_per_row, past_pages, i));
      }
      std::copy_n(row, words_for_bits(past_pages), mask.row(head, i));
    }
  }
  return {};
}

Status copy_csr(const SelectInput& input, const ExternalMask& external, BlockMask& mask) {
  const auto num_blocks = static_cast<std::int64_t>(mask.blocks.size());
  const std::int64_t num_rows = external.heads * num_blocks;
  if (static_cast<std::int64_t>(external.row_begin.size()) != num_rows + 1 || external.row_begin.front() != 0 ||
      external.row_begin.back() != static_cast<std::int64_t>(external.pages.size())) {
    return invalid_argument(
        fmt::format("external: row_begin has {} entries for {} heads x {} query blocks and {} pages; expected one more "
                    "than the rows, from 0 to the number of pages",
                    external.row_begin.size(), external.heads, num_blocks, external.pages.size()));
  }
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const auto head = static_cast<std::int32_t>(row / num_blocks);
    const auto i = static_cast<std::int32_t>(row % num_blocks);
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(mask.blocks[static_cast<std::size_t>(i)].chunk)];
    const std::int32_t past_pages = chunk.num_past_pages(input.page_tokens);
    const std::int64_t begin = external.row_begin[static_cast<std::size_t>(row)];
    const std::int64_t end = external.row_begin[static_cast<std::size_t>(row) + 1];
    if (begin > end || begin < 0 || end > static_cast<std::int64_t>(external.pages.size())) {
      return invalid_argument(
          fmt::format("external: row (head {}, query block {}) runs from entry {} to {}; allowed: "
                      "ascending, within {} pages",
                      head, i, begin, end, external.pages.size()));
    }
    for (std::int64_t entry = begin; entry < end; ++entry) {
      const std::int32_t named = external.pages[static_cast<std::size_t>(entry)];
      const std::int32_t j = external.physical ? logical_page(chunk, past_pages, named) : named;
      if (j < 0 || j >= past_pages) {
        return invalid_argument(
            fmt::format("external: row (head {}, query block {}) names {} page {}; its chunk has {} "
                        "past pages",
                        head, i, external.physical ? "physical" : "logical", named, past_pages));
      }
      set_bit(mask.row(head, i), j);
    }
  }
  return {};
}

Status copy_tokens(const SelectInput& input, const ExternalMask& external, BlockMask& mask) {
  const std::int64_t row_entries = std::int64_t{external.heads} * external.tokens_per_row;
  if (external.tokens_per_row < 0 ||
      static_cast<std::int64_t>(external.tokens.size()) != std::int64_t{input.q.tokens} * row_entries) {
    return invalid_argument(fmt::format("external: {} token indices; expected {} rows of Q x {} heads x {}",
                                        external.tokens.size(), input.q.tokens, external.heads,
                                        external.tokens_per_row));
  }
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(mask.blocks.size()); ++i) {
    const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
    const std::int32_t past_tokens = chunk.num_past_pages(input.page_tokens) * input.page_tokens;
    for (std::int32_t head = 0; head < external.heads; ++head) {
      std::int64_t named = 0;
      std::uint64_t* words = mask.row(head, i);
      for (std::int32_t t = 0; t < block.tokens; ++t) {
        const std::int32_t position = block.first_position + t;
        const std::int64_t first = (block.q_begin + t) * row_entries + std::int64_t{head} * external.tokens_per_row;
        for (std::int32_t n = 0; n < external.tokens_per_row; ++n) {
          const std::int32_t token = external.tokens[static_cast<std::size_t>(first + n)];
          if (token == -1) continue;
          if (token < 0 || token > position) {
            return invalid_argument(
                fmt::format("external: the query at position {}, head {}, names token {}; allowed: "
                            "0 to {}, or -1 for none",
                            position, head, token, position));
          }
          if (token >= past_tokens) continue;  // in the chunk, which is read in any case
          set_bit(words, token / input.page_tokens);
          ++named;
        }
      }
      std::int64_t pages = 0;
      for (std::int32_t word = 0; word < mask.words_per_row; ++word) pages += std::popcount(words[word]);
      mask.named_row_tokens += named;
      mask.kept_row_tokens += pages * input.page_tokens * block.tokens;
    }
  }
  return {};
}

class ExternalSelector final : public Selector {
 public:
  [[nodiscard]] std::string_view name() const noexcept override { return "external"; }
  [[nodiscard]] SelectorNeeds needs() const noexcept override { return {}; }

  [[nodiscard]] Status select(const SelectInput& input, BlockMask& mask, ThreadPool&) const override {
    CA_RETURN_IF_ERROR(check_scoreless("external", input));
    if (input.external == nullptr) {
      return invalid_argument("external: the step has no mask; set SelectInput::external");
    }
    const ExternalMask& external = *input.external;
    CA_RETURN_IF_ERROR(check_shape(input, external));
    mask.reset(external.heads, input.page_tokens, input.chunks, make_query_blocks(input.chunks, external.block_tokens));
    for (std::size_t b = 0; b < input.chunks.size(); ++b) {
      if (input.chunks[b].chunk_tokens > 0 && input.chunks[b].page_table == nullptr) {
        return invalid_argument(fmt::format("external: chunk {} has no page table", b));
      }
    }
    switch (external.form) {
      case ExternalMask::Form::kWords: return copy_words(input, external, mask);
      case ExternalMask::Form::kCsr: return copy_csr(input, external, mask);
      case ExternalMask::Form::kTokens:
        CA_RETURN_IF_ERROR(copy_tokens(input, external, mask));
        if (external.heads == 1) share_row(input.q.heads, mask);
        return {};
    }
    return invalid_argument(
        fmt::format("external: form {}; allowed: 0 (words), 1 (CSR), 2 (tokens)", static_cast<int>(external.form)));
  }

 private:
  // One index for all heads becomes a row for each of them.
  static void share_row(std::int32_t heads, BlockMask& mask) {
    const std::vector<std::uint64_t> row = mask.words;
    mask.mask_heads = heads;
    mask.words.clear();
    for (std::int32_t head = 0; head < heads; ++head) mask.words.insert(mask.words.end(), row.begin(), row.end());
  }
};

}  // namespace

Result<std::unique_ptr<Selector>> make_external_selector(const SelectorOptions&) {
  return std::unique_ptr<Selector>(std::make_unique<ExternalSelector>());
}

}  // namespace compact
