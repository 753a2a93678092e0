#include "src/unite/span_tree.h"

#include <algorithm>
#include <bit>

namespace compact {
namespace {

class Tree {
 public:
  explicit Tree(const SpanTreeInput& input) : input_(input), words_(static_cast<std::size_t>(input.words_per_row)) {
    // The root holds the first and the last leaf.
    const auto first = static_cast<std::uint32_t>(input.leaves.front().index);
    const auto last = static_cast<std::uint32_t>(input.leaves.back().index);
    root_level_ = static_cast<std::int32_t>(std::bit_width(first ^ last));
    scratch_.resize(words_ * static_cast<std::size_t>(root_level_ + 1));
  }

  SpanTreeResult solve() {
    result_.cost = visit(root_level_, 0, static_cast<std::int32_t>(input_.leaves.size()), scratch_.data()).cost;
    return std::move(result_);
  }

 private:
  struct Node {
    std::int64_t cost = 0;    // of the best units under this node
    std::int64_t wanted = 0;  // rows * pages
    std::int32_t tokens = 0;
  };

  // Cost and inflation of the node as one unit with the given union.
  [[nodiscard]] bool merge_pays(Node& node, const std::uint64_t* united) const {
    std::int32_t pages = 0;
    for (std::size_t w = 0; w < words_; ++w) pages += std::popcount(united[w]);
    const std::int64_t whole = cost_of(node.tokens, pages);
    const std::int64_t listed = std::int64_t{node.tokens} * input_.heads_per_unit * pages;
    const bool inflated =
        input_.max_inflation_1024ths > 0 && listed * 1024 > node.wanted * input_.max_inflation_1024ths;
    if (inflated || whole > node.cost) return false;
    node.cost = whole;
    return true;
  }

  [[nodiscard]] std::int64_t cost_of(std::int32_t tokens, std::int32_t past_pages) const {
    return unit_cost(input_.cost, tokens, input_.heads_per_unit, past_pages + input_.chunk_pages, input_.page_tokens);
  }

  // Units of the leaves [begin, end), which one node of `level` holds; their union goes to `united`, one of root_level_
  // + 1 rows of scratch of which the ones behind it are free.
  Node visit(std::int32_t level, std::int32_t begin, std::int32_t end, std::uint64_t* united) {
    const auto leaf = [&](std::int32_t i) -> const QuerySpan& { return input_.leaves[static_cast<std::size_t>(i)]; };
    if (end - begin == 1) {
      const std::uint64_t* row = input_.words + static_cast<std::size_t>(begin) * words_;
      std::copy_n(row, words_, united);
      std::int32_t pages = 0;
      for (std::size_t w = 0; w < words_; ++w) pages += std::popcount(row[w]);
      result_.unit_ends.push_back(end);
      return {cost_of(leaf(begin).tokens, pages), input_.wanted[begin], leaf(begin).tokens};
    }
    // Leaves are consecutive: the right half begins at the next multiple of 2^(level - 1), if that lies inside.
    const std::int64_t half = std::int64_t{1} << (level - 1);
    const std::int64_t edge = (leaf(begin).index / half + 1) * half;
    const auto middle = static_cast<std::int32_t>(std::min<std::int64_t>(end, begin + edge - leaf(begin).index));
    if (middle == end) return visit(level - 1, begin, end, united);
    const std::size_t units_before = result_.unit_ends.size();
    const Node left = visit(level - 1, begin, middle, united);
    std::uint64_t* right_union = united + words_;
    const Node right = visit(level - 1, middle, end, right_union);
    for (std::size_t w = 0; w < words_; ++w) united[w] |= right_union[w];
    Node node{left.cost + right.cost, left.wanted + right.wanted, left.tokens + right.tokens};
    if (merge_pays(node, united)) {
      result_.unit_ends.resize(units_before);
      result_.unit_ends.push_back(end);
    }
    return node;
  }

  const SpanTreeInput& input_;
  std::size_t words_;
  std::int32_t root_level_ = 0;
  std::vector<std::uint64_t> scratch_;  // [root_level + 1, words_per_row]
  SpanTreeResult result_;
};

}  // namespace

SpanTreeResult merge_spans(const SpanTreeInput& input) { return Tree(input).solve(); }

}  // namespace compact
