#include "engine/text/vocabulary.h"

#include <fmt/format.h>

#include "engine/text/byte_level.h"

namespace compact::engine {

Status Vocabulary::add(std::string_view spelling, int64_t id) {
  if (id < 0 || id > kMaxTokenId) {
    return io_error(fmt::format("token \"{}\" has id {}; allowed: 0 to {}", spelling, id, kMaxTokenId));
  }
  const size_t index = static_cast<size_t>(id);
  if (index < by_id_.size() && by_id_[index] != nullptr) {
    return io_error(fmt::format("tokens \"{}\" and \"{}\" share id {}", *by_id_[index], spelling, id));
  }
  std::optional<std::string> bytes = byte_level_bytes(spelling);
  Map& map = bytes ? by_bytes_ : by_foreign_spelling_;
  const auto [entry, is_new] = map.emplace(bytes ? std::move(*bytes) : std::string(spelling), static_cast<int32_t>(id));
  if (!is_new) return io_error(fmt::format("token \"{}\" has two ids, {} and {}", spelling, entry->second, id));
  if (index >= by_id_.size()) by_id_.resize(index + 1, nullptr);
  by_id_[index] = &entry->first;
  return {};
}

std::optional<int32_t> Vocabulary::find_bytes(std::string_view bytes) const {
  const auto entry = by_bytes_.find(bytes);
  if (entry == by_bytes_.end()) return std::nullopt;
  return entry->second;
}

std::optional<int32_t> Vocabulary::find_spelling(std::string_view spelling) const {
  if (const std::optional<std::string> bytes = byte_level_bytes(spelling)) return find_bytes(*bytes);
  const auto entry = by_foreign_spelling_.find(spelling);
  if (entry == by_foreign_spelling_.end()) return std::nullopt;
  return entry->second;
}

std::optional<std::string_view> Vocabulary::bytes_of(int32_t id) const {
  if (id < 0 || id >= id_limit()) return std::nullopt;
  const std::string* bytes = by_id_[static_cast<size_t>(id)];
  if (bytes == nullptr) return std::nullopt;
  return *bytes;
}

}  // namespace compact::engine
