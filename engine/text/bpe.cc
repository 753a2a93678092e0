#include "engine/text/bpe.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>

#include "engine/text/byte_level.h"

namespace compact::engine {
namespace {

uint64_t pair_of(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

}  // namespace

size_t Bpe::slot_of(uint64_t pair) const {
  const size_t mask = slots_.size() - 1;
  uint64_t hash = pair * 0x9E3779B97F4A7C15ULL;
  size_t slot = static_cast<size_t>(hash ^ hash >> 32) & mask;
  while (slots_[slot].pair != pair && slots_[slot].pair != kNoPair) slot = (slot + 1) & mask;
  return slot;
}

const Bpe::Merge* Bpe::find(int32_t left, int32_t right) const {
  const Slot& slot = slots_[slot_of(pair_of(left, right))];
  return slot.pair == kNoPair ? nullptr : &slot.merge;
}

Result<Bpe> Bpe::create(const Vocabulary& vocabulary, const std::vector<MergeSpelling>& merges, bool ignore_merges) {
  Bpe bpe;
  bpe.ignore_merges_ = ignore_merges;
  for (size_t byte = 0; byte < 256; ++byte) {
    const char text = static_cast<char>(byte);
    const std::optional<int32_t> id = vocabulary.find_bytes({&text, 1});
    if (!id) {
      return unsupported(
          fmt::format("byte 0x{:02X} (spelled \"{}\") is no token; allowed: byte-level vocabularies with all 256", byte,
                      byte_level_spell({&text, 1})));
    }
    bpe.byte_tokens_[byte] = *id;
  }

  bpe.slots_.resize(std::bit_ceil(2 * merges.size() + 2));
  int32_t rank = 0;
  for (const MergeSpelling& merge : merges) {
    const auto token = [&](std::string_view spelling, int32_t& id) -> Status {
      const std::optional<int32_t> found = vocabulary.find_spelling(spelling);
      if (!found) return io_error(fmt::format("merge {} names \"{}\", which is no token", rank, spelling));
      id = *found;
      return {};
    };
    int32_t left = 0;
    int32_t right = 0;
    int32_t joined = 0;
    CA_RETURN_IF_ERROR(token(merge.left, left));
    CA_RETURN_IF_ERROR(token(merge.right, right));
    CA_RETURN_IF_ERROR(token(std::string(merge.left) + std::string(merge.right), joined));
    const uint64_t pair = pair_of(left, right);
    bpe.slots_[bpe.slot_of(pair)] = {pair, {rank++, joined}};  // of a repeated pair the last rank counts
  }
  return bpe;
}

void Bpe::encode(const Vocabulary& vocabulary, std::string_view word, Scratch& scratch,
                 std::vector<int32_t>& ids) const {
  if (word.empty()) return;
  if (word.size() == 1) {
    ids.push_back(byte_token(static_cast<uint8_t>(word[0])));
    return;
  }
  using CachedWord = Scratch::CachedWord;
  CachedWord* cached = nullptr;
  if (word.size() <= CachedWord::kMaxBytes) {
    if (scratch.cache_.empty()) scratch.cache_.resize(Scratch::kNumCachedWords);
    cached = &scratch.cache_[std::hash<std::string_view>{}(word) % Scratch::kNumCachedWords];
    if (word == std::string_view(cached->bytes.data(), cached->num_bytes)) {
      ids.insert(ids.end(), cached->tokens.begin(), cached->tokens.begin() + cached->num_tokens);
      return;
    }
  }
  const size_t first = ids.size();
  const std::optional<int32_t> whole = ignore_merges_ ? vocabulary.find_bytes(word) : std::nullopt;
  if (whole) {
    ids.push_back(*whole);
  } else {
    merge_word(word, scratch, ids);
  }
  const size_t num_tokens = ids.size() - first;
  if (cached != nullptr && num_tokens <= CachedWord::kMaxTokens) {
    cached->num_bytes = static_cast<uint8_t>(word.size());
    cached->num_tokens = static_cast<uint8_t>(num_tokens);
    std::memcpy(cached->bytes.data(), word.data(), word.size());
    std::copy(ids.begin() + static_cast<std::ptrdiff_t>(first), ids.end(), cached->tokens.begin());
  }
}

void Bpe::merge_word(std::string_view word, Scratch& scratch, std::vector<int32_t>& ids) const {
  using Symbol = Scratch::Symbol;
  using Candidate = Scratch::Candidate;
  // Lowest rank first; of equal ranks the leftmost.
  const auto is_later = [](const Candidate& a, const Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
  };
  std::vector<Symbol>& symbols = scratch.symbols_;
  std::vector<Candidate>& heap = scratch.heap_;
  symbols.clear();
  heap.clear();

  const int32_t num_symbols = static_cast<int32_t>(word.size());
  symbols.reserve(word.size());
  for (int32_t i = 0; i < num_symbols; ++i) {
    const int32_t token = byte_token(static_cast<uint8_t>(word[static_cast<size_t>(i)]));
    symbols.push_back({token, i - 1, i + 1 < num_symbols ? i + 1 : -1});
  }
  const auto symbol = [&symbols](int32_t position) -> Symbol& { return symbols[static_cast<size_t>(position)]; };
  const auto merge_at = [&](int32_t position) -> const Merge* {
    const int32_t next = symbol(position).next;
    return next < 0 ? nullptr : find(symbol(position).token, symbol(next).token);
  };
  for (int32_t i = 0; i + 1 < num_symbols; ++i) {
    if (const Merge* merge = merge_at(i)) heap.push_back({merge->rank, i, merge->token});
  }
  std::make_heap(heap.begin(), heap.end(), is_later);

  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), is_later);
    const Candidate best = heap.back();
    heap.pop_back();
    if (symbol(best.position).token < 0) continue;
    // A candidate may be stale: a neighbour was joined elsewhere. As in the reference it still counts if what stands
    // there now joins to the same token, though by another pair.
    const Merge* merge = merge_at(best.position);
    if (merge == nullptr || merge->token != best.token) continue;

    Symbol& left = symbol(best.position);
    Symbol& right = symbol(left.next);
    left.token = best.token;
    right.token = -1;
    left.next = right.next;
    if (left.next >= 0) symbol(left.next).previous = best.position;

    const auto push = [&](int32_t position) {
      const Merge* next_merge = position < 0 ? nullptr : merge_at(position);
      if (next_merge == nullptr) return;
      heap.push_back({next_merge->rank, position, next_merge->token});
      std::push_heap(heap.begin(), heap.end(), is_later);
    };
    push(left.previous);
    push(best.position);
  }
  for (int32_t i = 0; i >= 0; i = symbol(i).next) ids.push_back(symbol(i).token);
}

}  // namespace compact::engine
