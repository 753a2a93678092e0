// Union and page lists of one tree: the spans of one (chunk, sub-group of query heads). One algorithm for the device
// and for the tests; the same units as src/unite/{span_unions,span_tree,block_union}.cc, by other loops:
//
//   rows     every span ORs the mask rows and forced pages of its query blocks       one warp per span and slice of
//   rows leaves   pages and cost of every span                                            one warp per span levels
//   kAdaptive: node i of level l joins its two children if one unit costs
//            no more                                                                 one warp per node
//   emit     the unit of a span is its highest joined ancestor; the first span's
//            place holds it, the others are empty                                    one warp per span and slice of
//            words
//
// `Team` supplies warps of lanes, and memory near them:
//   warp(), num_warps()   this warp and their number
//   lane(), lanes()       this lane and their number
//   warp_sum(x)           sum over the lanes, 64 bits
//   sum(x)                sum over all lanes of all warps; a barrier
//   sync()                barrier
//   or_into(p, x)         *p |= x, +=: several warps at once
//   add_into(p, x)
//   near_memory(bytes)    that much memory aligned to 8 bytes, or null: then the tree lies in the workspace
#pragma once

#include "src/core/count_bits.h"
#include "src/select/cuda/step_tables.h"
#include "src/select/forced_rule.h"
#include "src/unite/cost_model.h"

namespace compact {

// A node of the tree; leaves are level 0.
struct UniteNode {
  std::int64_t cost = 0;    // of the best units under it
  std::int64_t wanted = 0;  // rows * pages before the union
  std::int32_t tokens = 0;
  std::int32_t pages = 0;   // past pages of its union
  std::int32_t joined = 0;  // one unit; leaves always
  std::int32_t reserved = 0;
};
static_assert(sizeof(UniteNode) == 32);

struct UniteArgs {
  StepShape shape;
  StepTables tables;
  const std::int32_t* page_tables = nullptr;
  std::int64_t page_table_stride = 0;
  const std::uint64_t* mask = nullptr;  // [mask_heads, max_blocks, words_per_row]
  ForcedPages forced;
  bool dense = false;  // all pages, asked for
  bool adaptive = false;
  std::int32_t max_inflation_1024ths = 0;
  bool crosses_over = false;
  std::int32_t margin_1024ths = 0;  // CrossoverPolicy
  CostModel cost;
  std::uint64_t* node_words = nullptr;  // scratch [max_nodes, words_per_row]
  UniteNode* nodes = nullptr;           // scratch [max_nodes]
  CudaPageLists lists;
};

// n consecutive spans have at most n / 2^l + 2 nodes at level l, and positions below 2^31 give at most 31 levels.
constexpr std::int32_t kExtraNodesPerTree = 64;
constexpr std::int64_t max_unite_nodes(std::int64_t max_spans, std::int64_t num_chunks, std::int64_t sub_groups) {
  return sub_groups * (2 * max_spans + kExtraNodesPerTree * num_chunks);
}

// Nodes of one level: absolute indices [first, first + count), at `base` in the tree's scratch.
struct UniteLevel {
  std::int32_t first = 0;
  std::int32_t count = 0;
  std::int32_t base = 0;
};

constexpr std::int32_t kEmitWords = 8;  // of a slice

class UniteTree {
 public:
  template <class Team>
  CA_HOST_DEVICE UniteTree(const UniteArgs& args, std::int32_t tree, Team& team)
      : args_(args), chunk_(args.tables.chunks[tree / args.shape.sub_groups]), tree_(tree) {
    const StepShape& s = args.shape;
    first_slot_ = chunk_.first_span * s.sub_groups + tree % s.sub_groups * chunk_.num_spans;
    past_pages_ = chunk_.chunk_start / s.page_tokens;
    chunk_pages_ = num_runs(0, chunk_.chunk_start + chunk_.chunk_tokens, s.page_tokens) - past_pages_;
    if (chunk_.chunk_tokens == 0) return;
    leaves_ = {s.span_tokens == 0 ? 0 : chunk_.chunk_start / s.span_tokens, chunk_.num_spans, 0};
    if (args.adaptive) {  // the root holds the first and the last leaf
      const auto differing = static_cast<std::uint32_t>(leaves_.first ^ (leaves_.first + leaves_.count - 1));
      while (num_levels_ < 32 && differing >> num_levels_ != 0) ++num_levels_;
    }
    UniteLevel top = leaves_;
    for (std::int32_t level = 0; level < num_levels_; ++level) top = above(top);
    const std::int64_t num_nodes = top.base + top.count;
    void* near = team.near_memory(num_nodes * (std::int64_t{s.words_per_row} * 8 + std::int64_t{sizeof(UniteNode)}));
    if (near != nullptr) {
      nodes_ = static_cast<UniteNode*>(near);
      words_ = reinterpret_cast<std::uint64_t*>(nodes_ + num_nodes);
    } else {
      const std::int64_t first_node = std::int64_t{2} * first_slot_ + std::int64_t{kExtraNodesPerTree} * tree;
      nodes_ = args.nodes + first_node;
      words_ = args.node_words + first_node * s.words_per_row;
    }
  }

  template <class Team>
  CA_HOST_DEVICE void run(Team& team) {
    if (tree_ == 0 && team.warp() == 0 && team.lane() == 0) *args_.lists.num_units = args_.tables.header->num_units;
    UnionStats& stats = args_.lists.stats[tree_];
    const std::int64_t visible = std::int64_t{chunk_.chunk_tokens} * args_.shape.heads_per_unit * past_pages_;
    const auto finish = [&](std::int64_t listed, std::int64_t wanted, DenseReason reason) {
      if (team.warp() != 0 || team.lane() != 0) return;
      stats.listed_row_pages = listed;
      stats.wanted_row_pages = wanted;
      stats.visible_row_pages = visible;
      if (args_.lists.reasons != nullptr) args_.lists.reasons[tree_] = reason;
    };
    if (chunk_.chunk_tokens == 0) {
      for (std::int32_t k = team.warp(); k < chunk_.num_spans; k += team.num_warps()) leave_empty(team, k);
      finish(0, 0, DenseReason::kNone);
      return;
    }
    if (args_.dense || chunk_.is_short != 0) {
      list_all_pages(team);
      finish(visible, visible,
             past_pages_ == 0 ? DenseReason::kFirstChunk
             : args_.dense    ? DenseReason::kRequested
                              : DenseReason::kShortContext);
      return;
    }
    clear_leaves(team);
    team.sync();
    const std::int32_t slices = leaves_.count < team.num_warps() ? team.num_warps() / leaves_.count : 1;
    for (std::int32_t i = team.warp(); i < leaves_.count * slices; i += team.num_warps()) {
      unite_rows(team, i / slices, i % slices, slices);
    }
    team.sync();
    std::int64_t wanted = 0, listed = 0, cost = 0;  // rows * pages of this warp's leaves and units, the sum in lane 0
    for (std::int32_t k = team.warp(); k < leaves_.count; k += team.num_warps()) wanted += finish_leaf(team, k);
    UniteLevel below = leaves_;
    for (std::int32_t level = 1; level <= num_levels_; ++level) {
      team.sync();
      const UniteLevel here = above(below);
      for (std::int32_t i = team.warp(); i < here.count; i += team.num_warps()) join(team, below, here, i);
      below = here;
    }
    team.sync();
    wanted = team.sum(wanted);
    if (args_.crosses_over && past_pages_ > 0) {
      if (team.lane() == 0) {
        for (std::int32_t i = team.warp(); i < below.count; i += team.num_warps()) cost += nodes_[below.base + i].cost;
      }
      if (team.sum(cost) * (1024 + args_.margin_1024ths) >= cost_of(chunk_.chunk_tokens, past_pages_) * 1024) {
        list_all_pages(team);
        finish(visible, wanted, DenseReason::kHighDensity);
        return;
      }
    }
    const std::int32_t words = args_.shape.words_per_row;  // 0 in a step without a past: chunk pages are listed
    const std::int32_t word_slices = words <= kEmitWords ? 1 : (words + kEmitWords - 1) / kEmitWords;
    for (std::int32_t i = team.warp(); i < leaves_.count * word_slices; i += team.num_warps()) {
      listed += emit(team, i / word_slices, i % word_slices);
    }
    finish(team.sum(listed), wanted, past_pages_ == 0 ? DenseReason::kFirstChunk : DenseReason::kNone);
  }

 private:
  struct Tokens {  // of the chunk, absolute positions
    std::int32_t begin = 0;
    std::int32_t end = 0;
  };
  // Run `index` of `length` tokens, as far as the chunk reaches; length 0: the whole chunk.
  CA_HOST_DEVICE Tokens tokens_of(std::int32_t index, std::int32_t length) const {
    const std::int32_t chunk_end = chunk_.chunk_start + chunk_.chunk_tokens;
    if (length == 0) return {chunk_.chunk_start, chunk_end};
    const std::int64_t begin = std::int64_t{index} * length;  // a span's end may pass 2^31
    return {begin < chunk_.chunk_start ? chunk_.chunk_start : static_cast<std::int32_t>(begin),
            begin + length < chunk_end ? static_cast<std::int32_t>(begin + length) : chunk_end};
  }
  CA_HOST_DEVICE std::int64_t cost_of(std::int32_t tokens, std::int32_t past_pages) const {
    return cost_of_unit(args_.cost, tokens, args_.shape.heads_per_unit, past_pages + chunk_pages_,
                        args_.shape.page_tokens);
  }
  CA_HOST_DEVICE std::uint64_t* words_of(std::int32_t node) const {
    return words_ + std::int64_t{node} * args_.shape.words_per_row;
  }
  CA_HOST_DEVICE static UniteLevel above(const UniteLevel& below) {
    const std::int32_t first = below.first >> 1;
    return {first, ((below.first + below.count - 1) >> 1) - first + 1, below.base + below.count};
  }

  template <class Team>
  CA_HOST_DEVICE void clear_leaves(Team& team) {
    const std::int32_t num_lanes = team.num_warps() * team.lanes(), lane = team.warp() * team.lanes() + team.lane();
    for (std::int32_t i = lane; i < leaves_.count * args_.shape.words_per_row; i += num_lanes) words_[i] = 0;
    for (std::int32_t k = lane; k < leaves_.count; k += num_lanes) nodes_[k] = UniteNode{};
  }

  // ORs the rows of every `slices`th block of span k into its words, and adds the rows * pages that they want.
  template <class Team>
  CA_HOST_DEVICE void unite_rows(Team& team, std::int32_t k, std::int32_t slice, std::int32_t slices) {
    const StepShape& s = args_.shape;
    const Tokens span = tokens_of(leaves_.first + k, s.span_tokens);
    // The sub-group's rows: one of its KV head, for heads_per_unit query heads, or one for each of these.
    const bool shared_rows = s.mask_heads == s.num_kv_heads;
    const std::int32_t q_head = tree_ % s.sub_groups * s.heads_per_unit;
    const std::int32_t first_head = shared_rows ? q_head / s.group : q_head;
    const std::int32_t end_head = first_head + (shared_rows ? 1 : s.heads_per_unit);
    const std::int32_t first_block = chunk_.chunk_start / s.block_tokens;
    const std::int32_t begin = span.begin / s.block_tokens, end = (span.end - 1) / s.block_tokens + 1;
    std::int64_t wanted = 0;
    for (std::int32_t w = team.lane(); w < s.words_per_row; w += team.lanes()) {
      const std::uint64_t past = bits_in_word(0, past_pages_, w);
      std::uint64_t united = 0;
      for (std::int32_t head = first_head; head < end_head; ++head) {
        const std::int64_t first_row = std::int64_t{head} * s.max_blocks + chunk_.first_block - first_block;
        CA_DEVICE_UNROLL_4  // reads of four rows are on their way at once
            for (std::int32_t i = begin + slice; i < end; i += slices) {
          const Tokens block = tokens_of(i, s.block_tokens);
          const ForcedRanges forced =
              forced_ranges_at(args_.forced, block.begin, block.end - block.begin, s.page_tokens, past_pages_);
          const std::uint64_t word = (args_.mask[(first_row + i) * s.words_per_row + w] & past) |
                                     bits_in_word(0, forced.sink_end, w) |
                                     bits_in_word(forced.window_begin, forced.window_end, w);
          const std::int32_t tokens =
              (block.end < span.end ? block.end : span.end) - (block.begin > span.begin ? block.begin : span.begin);
          wanted += std::int64_t{count_bits(word)} * tokens;
          united |= word;
        }
      }
      if (united != 0) team.or_into(&words_of(k)[w], united);
    }
    wanted = team.warp_sum(wanted) * (shared_rows ? s.heads_per_unit : 1);
    if (team.lane() == 0 && wanted != 0) team.add_into(&nodes_[k].wanted, wanted);
  }

  // Returns the rows * pages that span k wants, in lane 0.
  template <class Team>
  CA_HOST_DEVICE std::int64_t finish_leaf(Team& team, std::int32_t k) {
    const std::int32_t pages = count_pages(team, words_of(k), args_.shape.words_per_row);
    if (team.lane() != 0) return 0;
    const Tokens span = tokens_of(leaves_.first + k, args_.shape.span_tokens);
    UniteNode& node = nodes_[k];
    node.tokens = span.end - span.begin;
    node.pages = pages;
    node.cost = cost_of(node.tokens, pages);
    node.joined = 1;
    return node.wanted;
  }

  // Pages in the first words of a set.
  template <class Team>
  CA_HOST_DEVICE static std::int32_t count_pages(Team& team, const std::uint64_t* words, std::int32_t num_words) {
    std::int32_t pages = 0;
    for (std::int32_t w = team.lane(); w < num_words; w += team.lanes()) pages += count_bits(words[w]);
    return static_cast<std::int32_t>(team.warp_sum(pages));
  }

  // Node i of level `here` from its children in `below`: a child without a sibling is passed on.
  template <class Team>
  CA_HOST_DEVICE void join(Team& team, const UniteLevel& below, const UniteLevel& here, std::int32_t i) {
    const std::int32_t left = 2 * (here.first + i) - below.first;
    const std::int32_t right = left + 1;
    const bool has_left = left >= 0;
    const bool has_right = right < below.count;
    const std::uint64_t* left_words = words_of(below.base + (has_left ? left : right));
    const std::uint64_t* right_words = words_of(below.base + (has_right ? right : left));
    std::int64_t pages = 0;
    for (std::int32_t w = team.lane(); w < args_.shape.words_per_row; w += team.lanes()) {
      const std::uint64_t word = left_words[w] | right_words[w];
      words_of(here.base + i)[w] = word;
      pages += count_bits(word);
    }
    pages = team.warp_sum(pages);
    if (team.lane() != 0) return;
    UniteNode node = nodes_[below.base + (has_left ? left : right)];
    node.joined = 0;
    if (has_left && has_right) {
      const UniteNode& other = nodes_[below.base + right];
      node.cost += other.cost;
      node.wanted += other.wanted;
      node.tokens += other.tokens;
      node.pages = static_cast<std::int32_t>(pages);
      const std::int64_t whole = cost_of(node.tokens, node.pages);
      const std::int64_t listed = std::int64_t{node.tokens} * args_.shape.heads_per_unit * pages;
      const bool inflated =
          args_.max_inflation_1024ths > 0 && listed * 1024 > node.wanted * args_.max_inflation_1024ths;
      if (!inflated && whole <= node.cost) {  // ties: one unit
        node.cost = whole;
        node.joined = 1;
      }
    }
    nodes_[here.base + i] = node;
  }

  // Writes a slice of the list of span k, the first one its unit too, or leaves its place empty if the unit began
  // before. Returns the unit's rows * past pages, in lane 0 of the first slice.
  template <class Team>
  CA_HOST_DEVICE std::int64_t emit(Team& team, std::int32_t k, std::int32_t slice) {
    const StepShape& s = args_.shape;
    std::int32_t node_idx = k, unit_level = 0;
    UniteLevel here = leaves_;
    for (std::int32_t level = 1; level <= num_levels_; ++level) {
      here = above(here);
      const std::int32_t i = here.base + ((leaves_.first + k) >> level) - here.first;
      if (nodes_[i].joined != 0) {
        node_idx = i;
        unit_level = level;
      }
    }
    const std::int32_t first_leaf = (leaves_.first + k) >> unit_level << unit_level;
    if (first_leaf < leaves_.first ? k != 0 : first_leaf != leaves_.first + k) {
      if (slice == 0) leave_empty(team, k);
      return 0;
    }
    const UniteNode node = nodes_[node_idx];
    if (slice == 0 && team.lane() == 0) {
      write_unit(k, tokens_of(leaves_.first + k, s.span_tokens).begin - chunk_.chunk_start, node.tokens, node.pages);
    }
    const std::int32_t* table = page_table();
    std::int32_t* ids = args_.lists.page_ids + list_begin(k);
    const std::uint64_t* words = words_of(node_idx);
    const std::int32_t first_word = slice * kEmitWords;
    const std::int32_t before = count_pages(team, words, first_word);
    // A lane's pages of all words first: then their ids are on their way at once.
    for (std::int32_t bit = team.lane(); bit < 64; bit += team.lanes()) {
      std::int32_t id[kEmitWords], place[kEmitWords], at = before;
      CA_DEVICE_UNROLL
      for (std::int32_t i = 0; i < kEmitWords; ++i) {
        const std::uint64_t word = first_word + i < s.words_per_row ? words[first_word + i] : 0;
        place[i] = (word >> bit & 1) != 0 ? at + count_bits(word & ((std::uint64_t{1} << bit) - 1)) : -1;
        id[i] = place[i] >= 0 ? table[(first_word + i) * 64 + bit] : 0;
        at += count_bits(word);
      }
      CA_DEVICE_UNROLL
      for (std::int32_t i = 0; i < kEmitWords; ++i) {
        if (place[i] >= 0) ids[place[i]] = id[i];
      }
    }
    if (slice > 0) return 0;
    for (std::int32_t j = team.lane(); j < chunk_pages_; j += team.lanes())
      ids[node.pages + j] = table[past_pages_ + j];
    return team.lane() == 0 ? std::int64_t{node.tokens} * s.heads_per_unit * node.pages : 0;
  }

  CA_HOST_DEVICE const std::int32_t* page_table() const {
    return args_.page_tables + chunk_.table_row * args_.page_table_stride;
  }
  CA_HOST_DEVICE std::int32_t list_begin(std::int32_t k) const { return (first_slot_ + k) * args_.shape.list_capacity; }

  // The unit in the place of span k: `tokens` from `offset` in the chunk on.
  CA_HOST_DEVICE void write_unit(std::int32_t k, std::int32_t offset, std::int32_t tokens, std::int32_t past_pages) {
    const std::int32_t q_head = tree_ % args_.shape.sub_groups * args_.shape.heads_per_unit;
    AttentionUnit unit;
    unit.q_begin = chunk_.q_begin + offset;
    unit.q_len = tokens;
    unit.q_head = q_head;
    unit.kv_head = q_head / args_.shape.group;
    unit.list_begin = list_begin(k);
    unit.past_tokens = chunk_.chunk_start - (past_pages_ - past_pages) * args_.shape.page_tokens;
    unit.list_tokens = unit.past_tokens + chunk_.chunk_tokens;
    unit.causal_shift = offset;
    args_.lists.units[first_slot_ + k] = unit;
  }

  // One unit for the whole chunk, in the place of the first span.
  template <class Team>
  CA_HOST_DEVICE void list_all_pages(Team& team) {
    const std::int32_t num_lanes = team.num_warps() * team.lanes(), lane = team.warp() * team.lanes() + team.lane();
    const std::int32_t* table = page_table();
    std::int32_t* ids = args_.lists.page_ids + list_begin(0);
    for (std::int32_t j = lane; j < past_pages_ + chunk_pages_; j += num_lanes) ids[j] = table[j];
    for (std::int32_t k = team.warp() + 1; k < leaves_.count; k += team.num_warps()) leave_empty(team, k);
    if (lane == 0) write_unit(0, 0, chunk_.chunk_tokens, past_pages_);
  }

  template <class Team>
  CA_HOST_DEVICE void leave_empty(Team& team, std::int32_t k) {
    if (team.lane() == 0) args_.lists.units[first_slot_ + k] = AttentionUnit{};
  }

  const UniteArgs& args_;
  StepChunk chunk_;
  std::int32_t tree_;  // chunk * sub-groups + sub-group
  std::int32_t first_slot_ = 0;
  UniteNode* nodes_ = nullptr;
  std::uint64_t* words_ = nullptr;
  std::int32_t past_pages_ = 0;
  std::int32_t chunk_pages_ = 0;
  UniteLevel leaves_;
  std::int32_t num_levels_ = 0;
};

}  // namespace compact
