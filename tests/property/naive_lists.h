/// Union and page lists written as plainly as possible: one std::set of pages per unit. The oracle of the property test
/// and of the fuzzer (docs/design/method.md 8.1, O3).
#pragma once

#include <cstdint>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "compact/block_union.h"

namespace compact::testing {

/// Pages of one query block that are forced, by testing every past page against the rule.
[[nodiscard]] inline std::set<std::int32_t> naive_forced(const UnionInput& input, const ChunkView& chunk,
                                                         const QueryBlock& block) {
  const std::int64_t page_tokens = input.page_tokens;
  const std::int64_t window_pages = (input.forced.window_tokens + page_tokens - 1) / page_tokens;
  const std::int64_t low = (block.first_position / page_tokens - window_pages + 1) * page_tokens;
  const std::int64_t high = block.first_position + block.tokens - 1;
  std::set<std::int32_t> pages;
  for (std::int32_t j = 0; j < chunk.num_past_pages(input.page_tokens); ++j) {
    if (j * page_tokens < input.forced.sink_tokens) pages.insert(j);
    if (window_pages > 0 && j * page_tokens <= high && (j + 1) * page_tokens - 1 >= low) pages.insert(j);
  }
  return pages;
}

/// First difference between `lists` and the plain form, in words; empty if there is none.
[[nodiscard]] inline std::string difference_to_naive(const UnionInput& input, const BlockMask& mask,
                                                     const PageLists& lists) {
  std::ostringstream out;
  const std::int32_t group = input.num_q_heads / input.num_kv_heads;
  std::size_t u = 0;
  std::int64_t entries = 0;
  for (std::size_t b = 0; b < input.chunks.size(); ++b) {
    const ChunkView& chunk = input.chunks[b];
    UnionStats stats;
    for (std::int32_t q_head = 0; chunk.chunk_tokens > 0 && q_head < input.num_q_heads;
         q_head += lists.heads_per_unit) {
      std::set<std::int32_t> pages;
      for (std::size_t i = 0; i < mask.blocks.size(); ++i) {
        if (mask.blocks[i].chunk != static_cast<std::int32_t>(b)) continue;
        for (std::int32_t h = q_head; h < q_head + lists.heads_per_unit; ++h) {
          std::set<std::int32_t> wanted = naive_forced(input, chunk, mask.blocks[i]);
          const std::int32_t mask_head = mask.mask_heads == input.num_q_heads ? h : h / group;
          const std::uint64_t* row = mask.row(mask_head, static_cast<std::int32_t>(i));
          for (std::int32_t j = 0; j < chunk.num_past_pages(input.page_tokens); ++j) {
            if ((row[j / 64] >> (j % 64)) & 1U) wanted.insert(j);
          }
          stats.wanted_row_pages += static_cast<std::int64_t>(wanted.size()) * mask.blocks[i].tokens;
          pages.insert(wanted.begin(), wanted.end());
        }
      }
      const auto past = static_cast<std::int32_t>(pages.size());
      stats.listed_row_pages += std::int64_t{chunk.chunk_tokens} * lists.heads_per_unit * past;
      stats.visible_row_pages +=
          std::int64_t{chunk.chunk_tokens} * lists.heads_per_unit * chunk.num_past_pages(input.page_tokens);
      for (std::int32_t j = chunk.num_past_pages(input.page_tokens); j < chunk.num_pages(input.page_tokens); ++j) {
        pages.insert(j);
      }

      if (u == lists.units.size()) return "too few units";
      const AttentionUnit& unit = lists.units[u];
      const std::int32_t past_tokens = past * input.page_tokens + chunk.chunk_start % input.page_tokens;
      if (unit.q_begin != chunk.q_begin || unit.q_len != chunk.chunk_tokens || unit.q_head != q_head ||
          unit.kv_head != q_head / group || unit.causal_shift != 0 || unit.past_tokens != past_tokens ||
          unit.list_tokens != past_tokens + chunk.chunk_tokens || unit.list_begin != entries) {
        out << "record of unit " << u << " (chunk " << b << ", query head " << q_head << ")";
        return out.str();
      }
      if (entries + static_cast<std::int64_t>(pages.size()) > static_cast<std::int64_t>(lists.page_ids.size())) {
        return "too few list entries";
      }
      for (const std::int32_t j : pages) {
        const auto at = static_cast<std::size_t>(entries++);
        if (lists.logical_pages[at] != j || lists.page_ids[at] != chunk.page_table[j]) {
          out << "entry " << at << " of unit " << u << ": logical page " << lists.logical_pages[at] << ", physical "
              << lists.page_ids[at] << "; expected " << j << ", " << chunk.page_table[j];
          return out.str();
        }
      }
      ++u;
    }
    const UnionStats& seen = lists.chunk_stats[b];
    if (seen.listed_row_pages != stats.listed_row_pages || seen.wanted_row_pages != stats.wanted_row_pages ||
        seen.visible_row_pages != stats.visible_row_pages) {
      out << "statistics of chunk " << b << ": listed " << seen.listed_row_pages << ", wanted " << seen.wanted_row_pages
          << ", visible " << seen.visible_row_pages << "; expected " << stats.listed_row_pages << ", "
          << stats.wanted_row_pages << ", " << stats.visible_row_pages;
      return out.str();
    }
  }
  if (u != lists.units.size()) return "too many units";
  if (entries != static_cast<std::int64_t>(lists.page_ids.size()) ||
      lists.logical_pages.size() != lists.page_ids.size()) {
    return "too many list entries";
  }
  return "";
}

}  // namespace compact::testing
