#include "engine/eval/seeded_stream.h"

#include <unordered_set>

namespace compact::engine {

std::vector<std::int64_t> SeededStream::distinct_below(std::int64_t n, std::int64_t count) {
  // Redrawing is short for few draws of many; for more the first of a shuffle.
  std::vector<std::int64_t> drawn;
  if (count * 2 > n) {
    for (std::int64_t i = 0; i < n; ++i) drawn.push_back(i);
    shuffle(drawn);
    drawn.resize(static_cast<std::size_t>(count));
    return drawn;
  }
  std::unordered_set<std::int64_t> seen;
  while (static_cast<std::int64_t>(drawn.size()) < count) {
    const auto value = static_cast<std::int64_t>(below(static_cast<std::uint64_t>(n)));
    if (seen.insert(value).second) drawn.push_back(value);
  }
  return drawn;
}

}  // namespace compact::engine
