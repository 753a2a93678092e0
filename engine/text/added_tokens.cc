#include "engine/text/added_tokens.h"

#include <algorithm>

namespace compact::engine {
namespace {

bool lies_inside_one(std::span<const ByteRange> ranges, size_t begin, size_t end) {
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), begin,
                                      [](size_t pos, const ByteRange& r) { return pos < r.begin; });
  return after != ranges.begin() && end <= std::prev(after)->end;
}

}  // namespace

void AddedTokenFinder::add(const AddedToken& token) {
  uint32_t node = 0;
  for (const char c : token.content) {
    const uint64_t edge = uint64_t{node} << 8 | static_cast<uint8_t>(c);
    const auto [child, is_new] = children_.emplace(edge, static_cast<uint32_t>(nodes_.size()));
    if (is_new) nodes_.emplace_back();
    node = child->second;
  }
  nodes_[node] = {token.id, token.is_special};
  starts_token_[static_cast<uint8_t>(token.content[0])] = true;
}

std::optional<AddedTokenFinder::Match> AddedTokenFinder::find(std::string_view text, size_t from,
                                                              std::span<const ByteRange> control, size_t offset) const {
  if (empty()) return std::nullopt;
  for (size_t begin = from; begin < text.size(); ++begin) {
    if (!starts_token_[static_cast<uint8_t>(text[begin])]) continue;
    std::optional<Match> longest;
    uint32_t node = 0;
    for (size_t end = begin; end < text.size();) {
      const auto child = children_.find(uint64_t{node} << 8 | static_cast<uint8_t>(text[end]));
      if (child == children_.end()) break;
      node = child->second;
      ++end;
      const Node& here = nodes_[node];
      if (here.id < 0) continue;
      if (here.is_special && !lies_inside_one(control, offset + begin, offset + end)) continue;
      longest = Match{begin, end, here.id};
    }
    if (longest) return longest;
  }
  return std::nullopt;
}

}  // namespace compact::engine
