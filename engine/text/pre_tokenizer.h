/// Cuts text into the words that byte-pair merges may not cross.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "compact/status.h"

namespace compact::engine {

/// What a tokenizer.json asks for: Split steps in order, then ByteLevel.
struct PreTokenizerConfig {
  std::vector<std::string> split_patterns;  // behavior Isolated, invert false; Oniguruma syntax
  bool byte_level_regex = false;            // ByteLevel.use_regex: GPT-2's own rule after the others
  bool add_prefix_space = false;            // ByteLevel.add_prefix_space: a piece that starts with no space gets one
};

/// Immutable once made; one may serve many threads, each with a Scratch of its own.
class PreTokenizer {
 public:
  /// Working memory of split(); keeps the text that words made with add_prefix_space point into.
  class Scratch {
   public:
    Scratch();
    ~Scratch();
    Scratch(Scratch&&) noexcept;
    Scratch& operator=(Scratch&&) noexcept;

   private:
    friend class PreTokenizer;
    struct Matching;
    std::unique_ptr<Matching> matching_;
    std::vector<std::string_view> next_;
    std::deque<std::string> prefixed_;
  };

  /// Errors: kUnsupported for a pattern outside regex_dialect.h, kIoError for a malformed one.
  [[nodiscard]] static Result<PreTokenizer> create(const PreTokenizerConfig& config);

  PreTokenizer(PreTokenizer&&) noexcept;
  PreTokenizer& operator=(PreTokenizer&&) noexcept;
  ~PreTokenizer();

  /// Replaces `words` by the words of `text`, in order; without prefix spaces they cover it without gaps. They stay
  /// valid until `text` ends or the next call with this scratch.
  ///
  /// text   well-formed UTF-8
  /// Errors: kUnsupported if a pattern backtracks without end. The rules of the Llama-3, Qwen and GPT-2 families take
  /// linear time on any text.
  [[nodiscard]] Status split(std::string_view text, Scratch& scratch, std::vector<std::string_view>& words) const;

 private:
  struct Regex;
  PreTokenizer();

  std::vector<Regex> steps_;
  bool add_prefix_space_ = false;  // before the last step
  bool byte_level_regex_ = false;  // the last step is GPT-2's rule
};

}  // namespace compact::engine
