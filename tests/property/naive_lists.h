/// Union and page lists written as plainly as possible: one std::set of pages per unit, found token by token. The
/// oracle of the property test and of the fuzzer (docs/design/method.md 8.1, O3).
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
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

struct NaiveUnit {
  std::int32_t chunk = 0;
  std::int32_t q_head = 0;
  std::int32_t offset = 0;  // in the chunk
  std::int32_t tokens = 0;
  std::set<std::int32_t> past;                    // pages
  std::map<std::int32_t, std::int32_t> priority;  // of past pages, if any are given
  std::int64_t wanted = 0;                        // sum over tokens and heads of the pages that the row wants
};

class NaiveUnion {
 public:
  NaiveUnion(const UnionInput& input, const BlockMask& mask) : input_(input), mask_(mask) {
    const std::int32_t group = input.num_q_heads / input.num_kv_heads;
    block_of_.resize(input.chunks.size());
    for (const QueryBlock& block : mask.blocks) {
      std::vector<std::size_t>& of_token = block_of_[static_cast<std::size_t>(block.chunk)];
      of_token.insert(of_token.end(), static_cast<std::size_t>(block.tokens), rows_.size());
      const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
      const auto i = static_cast<std::int32_t>(&block - mask.blocks.data());
      rows_.emplace_back();
      priority_.emplace_back();
      for (std::int32_t h = 0; h < input.num_q_heads; ++h) {
        rows_.back().push_back(naive_forced(input, chunk, block));
        const std::uint64_t* row = mask.row(mask.mask_heads == input.num_q_heads ? h : h / group, i);
        for (std::int32_t j = 0; j < chunk.num_past_pages(input.page_tokens); ++j) {
          if ((row[j / 64] >> (j % 64)) & 1U) rows_.back().back().insert(j);
        }
        priority_.back().emplace_back();
        if (input.page_priority.empty()) continue;
        const auto first_bit = static_cast<std::size_t>(row - mask.words.data()) * 64;
        const std::set<std::int32_t> forced = naive_forced(input, chunk, block);
        for (const std::int32_t j : rows_.back().back()) {
          priority_.back().back()[j] =
              forced.contains(j) ? 255 : input.page_priority[first_bit + static_cast<std::size_t>(j)];
        }
      }
    }
    const UnionOptions& options = input.options;
    const bool tiles = options.mode == UnionMode::kTile || options.mode == UnionMode::kAdaptive;
    heads_per_unit =
        options.heads_per_unit != 0 ? options.heads_per_unit : (tiles ? group : default_heads_per_unit(group));
    if (heads_per_unit != kCheapestHeads) {
      units = build(heads_per_unit);
      return;
    }
    std::int64_t least = -1;
    for (std::int32_t heads = group; heads >= 1; --heads) {
      if (group % heads != 0) continue;
      std::vector<NaiveUnit> candidate = build(heads);
      std::int64_t cost = 0;
      for (const NaiveUnit& unit : candidate) cost += cost_of(unit, heads);
      if (least >= 0 && cost >= least) continue;
      least = cost;
      heads_per_unit = heads;
      units = std::move(candidate);
    }
  }

  std::int32_t heads_per_unit = 0;
  std::vector<NaiveUnit> units;

  [[nodiscard]] std::int64_t cost_of(const NaiveUnit& unit, std::int32_t heads) const {
    const ChunkView& chunk = input_.chunks[static_cast<std::size_t>(unit.chunk)];
    const std::int64_t pages = static_cast<std::int64_t>(unit.past.size()) + chunk.num_pages(input_.page_tokens) -
                               chunk.num_past_pages(input_.page_tokens);
    const std::int64_t list_tokens = pages * input_.page_tokens;
    std::int32_t heads_per_tile = 1;
    while (heads % (heads_per_tile * 2) == 0) heads_per_tile *= 2;
    const std::int32_t tile_tokens = std::max(1, 128 / heads_per_tile);
    std::int64_t m_tiles = 0;
    for (std::int32_t h = 0; h < heads; h += heads_per_tile) {
      for (std::int32_t t = 0; t < unit.tokens; t += tile_tokens) ++m_tiles;
    }
    const CostModel& cost = input_.options.cost;
    return m_tiles * (list_tokens * cost.tile / 128 + cost.m_tile) + list_tokens * cost.list_tile / 128 + cost.unit;
  }

 private:
  [[nodiscard]] NaiveUnit make_unit(std::int32_t b, std::int32_t q_head, std::int32_t heads, std::int32_t offset,
                                    std::int32_t tokens) const {
    NaiveUnit unit{b, q_head, offset, tokens, {}, {}, 0};
    std::size_t last_block = mask_.blocks.size();
    std::int64_t row_pages = 0;  // over the heads, of one token
    for (std::int32_t t = offset; t < offset + tokens; ++t) {
      const std::size_t i = block_of_[static_cast<std::size_t>(b)][static_cast<std::size_t>(t)];
      for (std::int32_t h = q_head; i != last_block && h < q_head + heads; ++h) {
        const std::set<std::int32_t>& row = rows_[i][static_cast<std::size_t>(h)];
        if (h == q_head) row_pages = 0;
        row_pages += static_cast<std::int64_t>(row.size());
        unit.past.insert(row.begin(), row.end());
        for (const auto& [page, priority] : priority_[i][static_cast<std::size_t>(h)]) {
          unit.priority[page] = std::max(unit.priority[page], priority);
        }
      }
      last_block = i;
      unit.wanted += row_pages;
    }
    return unit;
  }

  // Best units of the tokens of the chunk with floor(position / length) == index; length = leaf << level.
  [[nodiscard]] std::vector<NaiveUnit> best_of_node(std::int32_t b, std::int32_t q_head, std::int32_t heads,
                                                    std::int64_t leaf, std::int32_t level, std::int64_t index) const {
    const ChunkView& chunk = input_.chunks[static_cast<std::size_t>(b)];
    const std::int64_t length = leaf << level;
    const std::int64_t begin = std::max<std::int64_t>(index * length, chunk.chunk_start);
    const std::int64_t end = std::min<std::int64_t>((index + 1) * length, chunk.context_tokens());
    if (begin >= end) return {};
    NaiveUnit whole = make_unit(b, q_head, heads, static_cast<std::int32_t>(begin) - chunk.chunk_start,
                                static_cast<std::int32_t>(end - begin));
    if (level == 0) return {whole};
    std::vector<NaiveUnit> parts = best_of_node(b, q_head, heads, leaf, level - 1, index * 2);
    const std::vector<NaiveUnit> right = best_of_node(b, q_head, heads, leaf, level - 1, index * 2 + 1);
    if (parts.empty()) return right;
    if (right.empty()) return parts;
    parts.insert(parts.end(), right.begin(), right.end());
    std::int64_t parts_cost = 0;
    for (const NaiveUnit& unit : parts) parts_cost += cost_of(unit, heads);
    const std::int64_t listed = static_cast<std::int64_t>(whole.past.size()) * whole.tokens * heads;
    const std::int32_t bound = input_.options.max_inflation_1024ths;
    if (bound > 0 && listed * 1024 > whole.wanted * bound) return parts;
    return cost_of(whole, heads) <= parts_cost ? std::vector<NaiveUnit>{whole} : parts;
  }

  [[nodiscard]] std::vector<NaiveUnit> build(std::int32_t heads) const {
    std::int32_t heads_per_tile = 1;
    while (heads % (heads_per_tile * 2) == 0) heads_per_tile *= 2;
    const std::int32_t tile_tokens = std::max(1, 128 / heads_per_tile);
    std::vector<NaiveUnit> all;
    for (std::int32_t b = 0; b < static_cast<std::int32_t>(input_.chunks.size()); ++b) {
      const ChunkView& chunk = input_.chunks[static_cast<std::size_t>(b)];
      for (std::int32_t q_head = 0; q_head < input_.num_q_heads; q_head += heads) {
        if (input_.options.mode == UnionMode::kAdaptive && chunk.chunk_tokens > 0) {
          std::int32_t level = 0;  // the least at which one node holds the chunk
          const auto node = [&](std::int32_t p) { return p / tile_tokens >> level; };
          while (node(chunk.chunk_start) != node(chunk.context_tokens() - 1)) ++level;
          for (const NaiveUnit& unit : best_of_node(b, q_head, heads, tile_tokens, level, node(chunk.chunk_start))) {
            all.push_back(unit);
          }
          continue;
        }
        for (std::int32_t begin = 0, t = 1; t <= chunk.chunk_tokens; ++t) {
          const std::int32_t span = input_.options.mode == UnionMode::kSpan ? input_.options.span_tokens : tile_tokens;
          const bool cut = input_.options.mode != UnionMode::kPaper && (chunk.chunk_start + t) % span == 0;
          if (!cut && t < chunk.chunk_tokens) continue;
          all.push_back(make_unit(b, q_head, heads, begin, t - begin));
          begin = t;
        }
      }
    }
    return all;
  }

  const UnionInput& input_;
  const BlockMask& mask_;
  std::vector<std::vector<std::set<std::int32_t>>> rows_;  // [block][query head]  pages wanted, forced included
  std::vector<std::vector<std::map<std::int32_t, std::int32_t>>> priority_;  // [block][query head]  of those pages
  std::vector<std::vector<std::size_t>> block_of_;                           // [chunk][token]
};

/// First difference between `lists` and the plain form, in words; empty if there is none.
[[nodiscard]] inline std::string difference_to_naive(const UnionInput& input, const BlockMask& mask,
                                                     const PageLists& lists) {
  std::ostringstream out;
  const NaiveUnion naive(input, mask);
  const std::int32_t group = input.num_q_heads / input.num_kv_heads;
  if (lists.heads_per_unit != naive.heads_per_unit) {
    out << "heads per unit: " << lists.heads_per_unit << "; expected " << naive.heads_per_unit;
    return out.str();
  }
  if (lists.units.size() != naive.units.size()) {
    out << lists.units.size() << " units; expected " << naive.units.size();
    return out.str();
  }
  std::vector<UnionStats> stats(input.chunks.size());
  std::int64_t entries = 0;
  std::int64_t dropped_entries = 0;
  for (std::size_t u = 0; u < lists.units.size(); ++u) {
    const NaiveUnit& expected = naive.units[u];
    const AttentionUnit& unit = lists.units[u];
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(expected.chunk)];
    const std::int32_t past_pages = chunk.num_past_pages(input.page_tokens);
    const auto past = static_cast<std::int32_t>(expected.past.size());
    const std::int32_t past_tokens = past * input.page_tokens + chunk.chunk_start % input.page_tokens;
    if (unit.q_begin != chunk.q_begin + expected.offset || unit.q_len != expected.tokens ||
        unit.q_head != expected.q_head || unit.kv_head != expected.q_head / group ||
        unit.causal_shift != expected.offset || unit.past_tokens != past_tokens ||
        unit.list_tokens != past_tokens + chunk.chunk_tokens || unit.list_begin != entries) {
      out << "record of unit " << u << " (chunk " << expected.chunk << ", query head " << expected.q_head << ", tokens "
          << expected.offset << " + " << expected.tokens << ")";
      return out.str();
    }
    std::vector<std::int32_t> pages(expected.past.begin(), expected.past.end());
    std::stable_sort(pages.begin(), pages.end(), [&](std::int32_t a, std::int32_t b) {
      return !expected.priority.empty() && expected.priority.at(a) > expected.priority.at(b);
    });
    for (std::int32_t j = past_pages; j < chunk.num_pages(input.page_tokens); ++j) pages.push_back(j);
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
    if (input.options.list_dropped) {
      std::vector<std::int32_t> dropped;
      for (std::int32_t j = 0; j < past_pages; ++j) {
        if (!expected.past.contains(j)) dropped.push_back(chunk.page_table[j]);
      }
      const std::int64_t end = dropped_entries + static_cast<std::int64_t>(dropped.size());
      if (lists.dropped.size() != lists.units.size() || lists.dropped[u].begin != dropped_entries ||
          lists.dropped[u].count != static_cast<std::int32_t>(dropped.size()) ||
          end > static_cast<std::int64_t>(lists.dropped_ids.size()) ||
          !std::equal(dropped.begin(), dropped.end(), lists.dropped_ids.begin() + dropped_entries)) {
        out << "dropped pages of unit " << u;
        return out.str();
      }
      dropped_entries = end;
    }
    const std::int64_t rows = std::int64_t{expected.tokens} * lists.heads_per_unit;
    stats[static_cast<std::size_t>(expected.chunk)].add({rows * past, expected.wanted, rows * past_pages});
  }
  if (entries != static_cast<std::int64_t>(lists.page_ids.size()) ||
      lists.page_ids.size() != lists.logical_pages.size()) {
    return "too many list entries";
  }
  if (dropped_entries != static_cast<std::int64_t>(lists.dropped_ids.size()) ||
      lists.dropped.empty() != (lists.units.empty() || !input.options.list_dropped)) {
    return "too many dropped pages";
  }
  for (std::size_t b = 0; b < input.chunks.size(); ++b) {
    const UnionStats& seen = lists.chunk_stats[b];
    if (seen.listed_row_pages != stats[b].listed_row_pages || seen.wanted_row_pages != stats[b].wanted_row_pages ||
        seen.visible_row_pages != stats[b].visible_row_pages) {
      out << "statistics of chunk " << b << ": listed " << seen.listed_row_pages << ", wanted " << seen.wanted_row_pages
          << ", visible " << seen.visible_row_pages << "; expected " << stats[b].listed_row_pages << ", "
          << stats[b].wanted_row_pages << ", " << stats[b].visible_row_pages;
      return out.str();
    }
  }
  return "";
}

}  // namespace compact::testing
