// From rows of scores to rows of the mask: the budgets of src/select/budget.h by a group of threads, one algorithm for
// the device and for the tests. From the same scores it chooses the same pages, bit for bit: all weights are integers,
// so their sums do not depend on the order.
//
// Every rule keeps a prefix of the pages in order of (score descending, place ascending); a place is the page, or for
// a density (row, page) of the whole chunk. The prefix is the shortest whose weights reach a target. Its end is found
// by bits: of all keys (scores as ordered integers) the largest whose pages at or above it weigh enough, two bits a
// pass, then in the same way the last place among equals. No sorting, no histogram: sums over the group alone.
//
// `Team` supplies
//   index(), size()          this thread and their number
//   warp(), num_warps(), lane(), lanes()   the same as warps of lanes
//   sum(std::uint64_t (&)[3])  in place, over the group; a barrier
//   largest(std::uint32_t)     over the group; a barrier
//   put_bits(words, num_words, keep)   word bits j = keep(j), of every thread's part
//   add(p, x)                *p += x, of several groups at once
#pragma once

#include <cstdint>

#include "src/core/host_device.h"
#include "src/select/budget_math.h"
#include "src/select/cuda/score_rows.h"
#include "src/select/cuda/step_tables.h"
#include "src/select/forced_rule.h"

namespace compact {

// The rule in force for a layer, native rules resolved (native_rules.h).
struct ChooseRule {
  BudgetKind kind = BudgetKind::kThreshold;  // never kNative
  float value = 0;
  const float* head_values = nullptr;  // [mask_heads] in place of value, or null
  float lift = 0;                      // kThreshold: the threshold is max(value, lift / scored pages)
  bool above = false;                  // kThreshold: above it, not at it
  bool everything = false;             // kThreshold without one: the limits choose
  bool chunk_competes = false;         // kMass: pages of the chunk have scores too
  std::int32_t min_pages = 0;
  std::int32_t max_pages = 0;
};

// Whether no score of a row is looked at: all its past pages are kept.
[[nodiscard]] CA_HOST_DEVICE constexpr bool keeps_all(const ChooseRule& rule, float value) {
  return !rule.everything && keeps_all(rule.kind, value);
}

// Pages with a larger key, and of those with this key the places up to last_place.
struct PageCut {
  std::uint32_t key = 0xffffffff;
  std::uint32_t last_place = 0;

  CA_HOST_DEVICE constexpr bool keeps(std::uint32_t page_key, std::uint32_t place) const {
    return page_key > key || (page_key == key && place <= last_place);
  }
};

struct ChooseArgs {
  StepTables tables;
  ScoreRows rows;
  ChooseRule rule;
  ForcedPages forced;
  std::int32_t page_tokens = 0;
  std::int32_t block_tokens = 0;
  std::int32_t heads_per_row = 1;  // query heads that share a row
  std::int32_t words_per_row = 0;
  PageCut* chunk_cuts = nullptr;            // [num_chunks] of kDensity
  std::uint64_t* mask = nullptr;            // [mask_heads, max_blocks, words_per_row]
  std::uint64_t* nonfinite_rows = nullptr;  // [1] or null
};

// The end of the shortest prefix that weighs `target`; everything if all together weigh less. `visit(f)` calls
// f(key, place, weight) for this thread's items.
template <class Team, class Visit>
CA_HOST_DEVICE PageCut find_cut(Team& team, std::uint64_t target, Visit visit) {
  if (target == 0) return {};
  PageCut cut{0, 0xffffffff};
  CA_DEVICE_NO_UNROLL
  for (std::int32_t shift = 30; shift >= 0; shift -= 2) {
    std::uint64_t reached[3] = {};  // weight at or above key + (1, 2, 3 << shift)
    visit([&](std::uint32_t key, std::uint32_t, std::uint64_t weight) {
      for (std::uint32_t digit = 0; digit < 3; ++digit) {
        if (key >= (cut.key | (digit + 1) << shift)) reached[digit] += weight;
      }
    });
    team.sum(reached);
    const std::uint32_t digit = reached[2] >= target ? 3 : reached[1] >= target ? 2 : reached[0] >= target ? 1 : 0;
    cut.key |= digit << shift;
  }
  if (cut.key == 0) return cut;  // of no finite score: the target is out of reach
  std::uint64_t sums[3] = {};    // weight above the key, of the key, and how many have it
  visit([&](std::uint32_t key, std::uint32_t, std::uint64_t weight) {
    if (key > cut.key) sums[0] += weight;
    if (key == cut.key) sums[1] += weight, sums[2] += weight > 0 ? 1 : 0;
  });
  team.sum(sums);
  const std::uint64_t missing = target - sums[0];
  if (sums[2] == 1) return cut;
  cut.last_place = 0;  // the largest place before which less than `missing` stands
  CA_DEVICE_NO_UNROLL
  for (std::int32_t shift = 30; shift >= 0; shift -= 2) {
    std::uint64_t before[3] = {};
    visit([&](std::uint32_t key, std::uint32_t place, std::uint64_t weight) {
      if (key != cut.key) return;
      for (std::uint32_t digit = 0; digit < 3; ++digit) {
        if (place < (cut.last_place | (digit + 1) << shift)) before[digit] += weight;
      }
    });
    team.sum(before);
    const std::uint32_t digit = before[2] < missing ? 3 : before[1] < missing ? 2 : before[0] < missing ? 1 : 0;
    cut.last_place |= digit << shift;
  }
  return cut;
}

// A row of scores and its place in the step.
struct ChosenRow {
  const float* scores = nullptr;
  std::int32_t past_pages = 0;  // Np; 0: nothing to do
  std::int32_t first_position = 0;
  std::int32_t tokens = 0;

  CA_HOST_DEVICE std::uint32_t key(std::int32_t page) const { return ordered_bits(scores[page]); }
};

CA_HOST_DEVICE inline ChosenRow row_at(const ChooseArgs& args, const StepChunk& chunk, const QueryBlock& block,
                                       std::int64_t row) {
  return {args.rows.scores + row * args.rows.row_stride, chunk.chunk_start / args.page_tokens, block.first_position,
          block.tokens};
}

CA_HOST_DEVICE inline ForcedRanges forced_of(const ChooseArgs& args, const ChosenRow& row, std::int32_t pages) {
  return row_forced_ranges_at(args.forced, row.first_position, row.tokens, args.page_tokens, pages);
}

// kDensity: the end of what all rows of a chunk keep together, into chunk_cuts[b].
template <class Team>
CA_HOST_DEVICE void cut_chunk(Team& team, const ChooseArgs& args, std::int32_t b) {
  const StepChunk chunk = args.tables.chunks[b];
  const std::int32_t past_pages = chunk.chunk_start / args.page_tokens;
  if (chunk.chunk_tokens == 0 || chunk.is_short != 0 || past_pages == 0) return;
  const std::int32_t num_blocks = num_runs(chunk.chunk_start, chunk.chunk_tokens, args.block_tokens);
  const std::int32_t num_rows = args.rows.mask_heads * num_blocks;
  const auto row_of = [&](std::int32_t r) {
    return std::int64_t{r / num_blocks} * args.rows.max_blocks + chunk.first_block + r % num_blocks;
  };
  const auto block_of = [&](std::int32_t r) { return args.tables.blocks[chunk.first_block + r % num_blocks]; };

  std::uint64_t sums[3] = {};  // weight of all pages, of those that are kept anyway
  for (std::int32_t r = team.index(); r < num_rows; r += team.size()) {
    const QueryBlock block = block_of(r);
    const std::uint64_t weight =
        static_cast<std::uint64_t>(block.tokens) * static_cast<std::uint64_t>(args.heads_per_row);
    const ForcedRanges forced = forced_of(args, row_at(args, chunk, block, 0), past_pages);
    const std::int32_t kept = args.rows.nonfinite[row_of(r)] > 0 ? past_pages : num_forced(forced);
    sums[0] += weight * static_cast<std::uint64_t>(past_pages);
    sums[1] += weight * static_cast<std::uint64_t>(kept);
  }
  team.sum(sums);
  const std::uint64_t wanted = share_of(args.rule.value, sums[0]);
  const std::uint64_t target = wanted > sums[1] ? wanted - sums[1] : 0;
  const PageCut cut = find_cut(team, target, [&](auto item) {
    for (std::int32_t r = team.warp(); r < num_rows; r += team.num_warps()) {  // a warp reads of one row together
      const std::int32_t nonfinite = args.rows.nonfinite[row_of(r)];           // on its way together with the block
      const QueryBlock block = block_of(r);
      if (nonfinite > 0) continue;
      const ChosenRow row = row_at(args, chunk, block, row_of(r));
      const ForcedRanges forced = forced_of(args, row, past_pages);
      const std::uint64_t weight =
          static_cast<std::uint64_t>(block.tokens) * static_cast<std::uint64_t>(args.heads_per_row);
      constexpr std::int32_t kAhead = 16;  // reads on their way at once
      CA_DEVICE_NO_UNROLL
      for (std::int32_t first = team.lane(); first < past_pages; first += kAhead * team.lanes()) {
        std::uint32_t keys[kAhead];
        CA_DEVICE_UNROLL
        for (std::int32_t i = 0; i < kAhead; ++i) {
          const std::int32_t page = first + i * team.lanes();
          keys[i] = page < past_pages && !is_forced(forced, page) ? row.key(page) : 0;
        }
        CA_DEVICE_UNROLL
        for (std::int32_t i = 0; i < kAhead; ++i) {
          const std::int32_t page = first + i * team.lanes();
          if (keys[i] != 0) item(keys[i], static_cast<std::uint32_t>(r * past_pages + page), weight);
        }
      }
    }
  });
  if (team.index() == 0) args.chunk_cuts[b] = cut;
}

// What a budget of mass adds to the forced pages of a row.
template <class Team>
CA_HOST_DEVICE PageCut cut_mass(Team& team, const ChooseArgs& args, const ChosenRow& row, float value,
                                float elsewhere) {
  const std::int32_t diagonal = (row.first_position + row.tokens - 1) / args.page_tokens;
  const std::int32_t num_pages = args.rule.chunk_competes ? diagonal + 1 : row.past_pages;
  const ForcedRanges forced = forced_of(args, row, num_pages);
  std::uint32_t largest = ordered_bits(elsewhere);
  for (std::int32_t j = team.index(); j < num_pages; j += team.size()) {
    const std::uint32_t key = row.key(j);
    largest = key > largest ? key : largest;
  }
  const FixedPoint fixed(score_of(team.largest(largest)));
  std::uint64_t sums[3] = {};  // all, and what is read anyway
  for (std::int32_t j = team.index(); j < num_pages; j += team.size()) {
    const std::uint64_t mass = fixed(row.scores[j]);
    sums[0] += mass;
    if (is_forced(forced, j)) sums[1] += mass;
  }
  team.sum(sums);
  const std::uint64_t wanted = share_of(value, sums[0] + fixed(elsewhere));
  const std::uint64_t taken = sums[1] + fixed(elsewhere);
  return find_cut(team, wanted > taken ? wanted - taken : 0, [&](auto item) {
    for (std::int32_t j = team.index(); j < num_pages; j += team.size()) {
      if (!is_forced(forced, j)) item(row.key(j), static_cast<std::uint32_t>(j), fixed(row.scores[j]));
    }
  });
}

// The mask row of (mask head, query block).
template <class Team>
CA_HOST_DEVICE void choose_row(Team& team, const ChooseArgs& args, std::int32_t mask_head, std::int32_t block_idx) {
  if (block_idx >= args.tables.header->num_blocks) return;
  const QueryBlock block = args.tables.blocks[block_idx];
  if (block.tokens == 0) return;
  const StepChunk chunk = args.tables.chunks[block.chunk];
  if (chunk.is_short != 0) return;
  const std::int64_t row_idx = std::int64_t{mask_head} * args.rows.max_blocks + block_idx;
  const ChosenRow row = row_at(args, chunk, block, row_idx);
  const std::int32_t past_pages = row.past_pages;
  std::uint64_t* words = args.mask + row_idx * args.words_per_row;
  const auto put = [&](auto keep) {
    team.put_bits(words, args.words_per_row, [&](std::int32_t j) { return j < past_pages && keep(j); });
  };
  const ChooseRule& rule = args.rule;
  const float value = rule.head_values == nullptr ? rule.value : rule.head_values[mask_head];
  const bool all = past_pages == 0 || keeps_all(rule, value);
  const std::int32_t nonfinite = all ? 0 : args.rows.nonfinite[row_idx];
  if (all || nonfinite > 0) {
    put([](std::int32_t) { return true; });
    if (nonfinite > 0 && team.index() == 0 && args.nonfinite_rows != nullptr) team.add(args.nonfinite_rows, nonfinite);
    return;
  }

  // What the rule keeps: past pages that are not passed over, and reach the threshold or lie before the cut.
  const bool skips_forced = rule.kind == BudgetKind::kMass || rule.kind == BudgetKind::kDensity;
  const ForcedRanges forced = forced_of(args, row, past_pages);
  const auto counts = [&](std::int32_t j) { return !skips_forced || !is_forced(forced, j); };
  const auto best = [&](std::int32_t pages) {
    return find_cut(team, static_cast<std::uint64_t>(pages), [&](auto item) {
      for (std::int32_t j = team.index(); j < past_pages; j += team.size()) {
        if (counts(j)) item(row.key(j), static_cast<std::uint32_t>(j), std::uint64_t{1});
      }
    });
  };
  PageCut cut;
  float threshold = 0;
  std::int32_t first_place = 0;
  bool by_threshold = rule.kind == BudgetKind::kThreshold;
  if (by_threshold) {
    const float lifted = rule.lift > 0 ? rule.lift / static_cast<float>(args.rows.scored_pages[row_idx]) : 0.0F;
    threshold = lifted > value ? lifted : value;
  } else if (rule.kind == BudgetKind::kTopN) {
    cut = best(top_pages(value, past_pages));
  } else if (rule.kind == BudgetKind::kMass) {
    cut = cut_mass(team, args, row, value, args.rows.elsewhere == nullptr ? 0.0F : args.rows.elsewhere[row_idx]);
  } else {
    const std::int32_t num_blocks = num_runs(chunk.chunk_start, chunk.chunk_tokens, args.block_tokens);
    first_place = (mask_head * num_blocks + block_idx - chunk.first_block) * past_pages;
    cut = args.chunk_cuts[block.chunk];
  }
  const auto keeps = [&](std::int32_t j) {
    if (!counts(j)) return false;
    if (!by_threshold) return cut.keeps(row.key(j), static_cast<std::uint32_t>(first_place + j));
    return rule.everything || (rule.above ? row.scores[j] > threshold : row.scores[j] >= threshold);
  };
  if (rule.min_pages > 0 || rule.max_pages > 0) {
    std::uint64_t sums[3] = {};
    for (std::int32_t j = team.index(); j < past_pages; j += team.size()) sums[0] += keeps(j) ? 1 : 0;
    team.sum(sums);
    const auto kept = static_cast<std::int32_t>(sums[0]);
    const std::int32_t limit = kept < rule.min_pages                         ? rule.min_pages
                               : rule.max_pages > 0 && kept > rule.max_pages ? rule.max_pages
                                                                             : -1;
    if (limit >= 0) {  // what the rule keeps is a prefix too: the best `limit` pages hold it, or are part of it
      cut = best(limit);
      first_place = 0;
      by_threshold = false;
    }
  }
  put(keeps);
}

}  // namespace compact
