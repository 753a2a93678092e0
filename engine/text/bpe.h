/// Byte-pair encoding of one word.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "compact/status.h"
#include "engine/text/vocabulary.h"

namespace compact::engine {

/// Two spellings that join to a third, as the file lists them: earlier ones first.
struct MergeSpelling {
  std::string_view left;
  std::string_view right;
};

class Bpe {
 public:
  /// Working memory of encode(), with the words met last.
  class Scratch;

  /// Reads the merges against `vocabulary`, which is needed again by encode().
  ///
  /// ignore_merges   a word that is itself a token becomes that token, whatever the merges say (Llama-3)
  /// Errors: kUnsupported if one of the 256 bytes is no token (text could then be lost); kIoError if a merge names a
  /// token that the vocabulary lacks.
  [[nodiscard]] static Result<Bpe> create(const Vocabulary& vocabulary, const std::vector<MergeSpelling>& merges,
                                          bool ignore_merges);

  /// Appends the ids of `word` (any bytes) to `ids`. Takes n log n time in the length of the word, which must be
  /// below 2^31 bytes.
  void encode(const Vocabulary& vocabulary, std::string_view word, Scratch& scratch, std::vector<int32_t>& ids) const;

  /// Id of the token of a single byte.
  [[nodiscard]] int32_t byte_token(uint8_t byte) const { return byte_tokens_[byte]; }

 private:
  struct Merge {
    int32_t rank;
    int32_t token;
  };
  // Open addressing with linear probing, at most half full: one or two cache lines a look-up, and there is one look-up
  // for each pair of neighbours ever seen.
  struct Slot {
    uint64_t pair = kNoPair;
    Merge merge{};
  };
  static constexpr uint64_t kNoPair = ~uint64_t{0};

  [[nodiscard]] size_t slot_of(uint64_t pair) const;
  [[nodiscard]] const Merge* find(int32_t left, int32_t right) const;
  void merge_word(std::string_view word, Scratch& scratch, std::vector<int32_t>& ids) const;

  std::array<int32_t, 256> byte_tokens_{};
  std::vector<Slot> slots_;  // a power of two
  bool ignore_merges_ = false;
};

class Bpe::Scratch {
 private:
  friend class Bpe;

  struct Symbol {
    int32_t token;     // -1: joined into the symbol before
    int32_t previous;  // -1: none
    int32_t next;      // -1: none
  };
  struct Candidate {
    int32_t rank;
    int32_t position;
    int32_t token;
  };
  // Text repeats its words, so the last ones are kept: a direct-mapped table that holds no pointers and cannot grow.
  struct CachedWord {
    static constexpr size_t kMaxBytes = 22;
    static constexpr size_t kMaxTokens = 6;
    uint8_t num_bytes = 0;
    uint8_t num_tokens = 0;
    std::array<char, kMaxBytes> bytes;
    std::array<int32_t, kMaxTokens> tokens;
  };
  static constexpr size_t kNumCachedWords = 8192;

  std::vector<Symbol> symbols_;
  std::vector<Candidate> heap_;
  std::vector<CachedWord> cache_;
};

}  // namespace compact::engine
