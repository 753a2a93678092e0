/// Finds the tokens that a file adds beside its vocabulary: control tokens such as <|eot_id|>, and ordinary ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace compact::engine {

struct AddedToken {
  std::string content;
  int32_t id = 0;
  bool is_special = false;     ///< a control token: recognised in control text only, left out when decoding for people
  bool is_normalized = false;  ///< looked for after normalization instead of before
};

/// A part [begin, end) of a text, in bytes.
struct ByteRange {
  size_t begin = 0;
  size_t end = 0;
};

/// A trie over the contents of added tokens.
class AddedTokenFinder {
 public:
  struct Match {
    size_t begin = 0;
    size_t end = 0;
    int32_t id = 0;
  };

  /// Precondition: the content is not empty and was not added before.
  void add(const AddedToken& token);

  [[nodiscard]] bool empty() const { return nodes_.size() == 1; }

  /// The leftmost match in `text` at or after `from`, and of those the longest.
  ///
  /// control   ascending, disjoint; in positions of the whole text. A special token counts only inside one of them.
  /// offset    position of `text` in the whole text
  [[nodiscard]] std::optional<Match> find(std::string_view text, size_t from, std::span<const ByteRange> control,
                                          size_t offset) const;

 private:
  struct Node {
    int32_t id = -1;  // -1: no token ends here
    bool is_special = false;
  };

  std::vector<Node> nodes_{Node{}};
  std::unordered_map<uint64_t, uint32_t> children_;  // node << 8 | byte -> node
  bool starts_token_[256] = {};
};

}  // namespace compact::engine
