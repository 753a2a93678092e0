/// Token ids and the bytes they stand for.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "compact/status.h"

namespace compact::engine {

/// Largest id a tokenizer.json may use. The tables are dense in the id, so a hostile file must not choose their size;
/// the largest vocabularies in use have about 260 thousand entries.
inline constexpr int64_t kMaxTokenId = (int64_t{1} << 22) - 1;

class Vocabulary {
 public:
  /// Adds an entry as the file spells it (see byte_level.h). An entry outside the byte alphabet is kept under its
  /// spelling: text can never produce it, but its id can be decoded.
  /// Errors: kIoError if the id is out of range or taken, or the spelling is already known.
  [[nodiscard]] Status add(std::string_view spelling, int64_t id);

  /// Id of a token given as the bytes it stands for.
  [[nodiscard]] std::optional<int32_t> find_bytes(std::string_view bytes) const;

  /// Id of a token given as the file spells it.
  [[nodiscard]] std::optional<int32_t> find_spelling(std::string_view spelling) const;

  /// The bytes of an id; none if the id is unused.
  [[nodiscard]] std::optional<std::string_view> bytes_of(int32_t id) const;

  /// Highest id + 1.
  [[nodiscard]] int32_t id_limit() const { return static_cast<int32_t>(by_id_.size()); }

 private:
  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const noexcept { return std::hash<std::string_view>{}(text); }
  };
  using Map = std::unordered_map<std::string, int32_t, Hash, std::equal_to<>>;

  Map by_bytes_;
  Map by_foreign_spelling_;
  std::vector<const std::string*> by_id_;  // [id_limit]  keys of the maps, whose nodes never move; null if unused
};

}  // namespace compact::engine
