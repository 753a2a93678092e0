/// Byte-level BPE tokenizers, from the tokenizer.json that checkpoints carry.
///
/// What is implemented is what the Llama-3, Qwen and GPT-2 families use: model BPE over a byte-level vocabulary,
/// normalizer NFC or none, pre-tokenizer Split and ByteLevel, post-processor ByteLevel and TemplateProcessing, decoder
/// ByteLevel. Anything else in a file that would change ids is refused by name when it is loaded; `truncation` and
/// `padding` are never applied. On valid UTF-8 the ids equal those of the `tokenizers` package.
///
/// Text need not be valid UTF-8. A byte that belongs to no well-formed sequence becomes the token of that byte alone,
/// and the stretches between such bytes are encoded as texts of their own. So nothing is lost: without a normalizer and
/// a prefix space decode(encode(x)) is x for any bytes, and with NFC it is x with its valid stretches in NFC.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "compact/status.h"

namespace compact::engine {

/// A part of a prompt. In control text the names of special tokens stand for those tokens; elsewhere they are plain
/// text, so that a user who types <|eot_id|> does not end the turn.
struct TextSegment {
  std::string text;
  bool is_control = false;
};

/// Immutable once made; one may serve many threads.
class Tokenizer {
 public:
  /// Longest text of one encode call.
  static constexpr int64_t kMaxTextBytes = int64_t{1} << 30;

  /// Reads a tokenizer.json.
  /// Errors: kIoError if the file is missing or malformed, kUnsupported for a kind of tokenizer listed above as
  /// refused. Both name the file and the key.
  [[nodiscard]] static Result<Tokenizer> load(const std::filesystem::path& tokenizer_json);

  /// The same from memory; `name` stands for the file in messages.
  [[nodiscard]] static Result<Tokenizer> parse(std::string_view json, std::string_view name);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  /// Ids of `bytes`, all of it control text.
  ///
  /// add_special_tokens   also what the file puts around a text, e.g. <|begin_of_text|>; a rendered chat has it already
  /// Errors: kInvalidArgument above kMaxTextBytes; kUnsupported if a rule of the file backtracks without end.
  [[nodiscard]] Result<std::vector<int32_t>> encode(std::string_view bytes, bool add_special_tokens) const;

  /// Ids of the segments joined: the same as encode() of the joined text, except that special tokens are recognised
  /// inside control segments only. Added tokens that the file does not call special are recognised everywhere.
  [[nodiscard]] Result<std::vector<int32_t>> encode_segments(std::span<const TextSegment> segments,
                                                             bool add_special_tokens) const;

  /// The bytes of `ids` joined. Ids that stand for nothing are passed over. May end inside a character: Utf8Stream
  /// (utf8.h) makes printable text of it.
  [[nodiscard]] std::string decode(std::span<const int32_t> ids, bool skip_special_tokens = true) const;

  /// Id of an added token by its content, else of a vocabulary entry as the file spells it.
  [[nodiscard]] std::optional<int32_t> token_id(std::string_view token) const;

  /// True if `id` is a special token.
  [[nodiscard]] bool is_special(int32_t id) const;

  /// Highest id + 1, added tokens included. A checkpoint's embedding may have more rows, never fewer.
  [[nodiscard]] int32_t vocab_size() const;

 private:
  friend class TokenizerReader;
  struct Impl;
  explicit Tokenizer(std::unique_ptr<const Impl> impl);

  std::unique_ptr<const Impl> impl_;
};

}  // namespace compact::engine
