#include "engine/text/tokenizer.h"

#include <fmt/format.h>

#include "engine/text/normalizer.h"
#include "engine/text/tokenizer_impl.h"
#include "engine/text/utf8.h"

namespace compact::engine {
namespace {

// One encode call: text goes down the stages, ids come out in order.
class Encoder {
 public:
  Encoder(const Vocabulary& vocabulary, const Bpe& bpe, const PreTokenizer& pre_tokenizer,
          const AddedTokenFinder& before_normalizer, const AddedTokenFinder& after_normalizer, bool normalize_nfc,
          std::span<const ByteRange> control, std::vector<int32_t>& ids)
      : vocabulary_(vocabulary),
        bpe_(bpe),
        pre_tokenizer_(pre_tokenizer),
        before_normalizer_(before_normalizer),
        after_normalizer_(after_normalizer),
        normalize_nfc_(normalize_nfc),
        control_(control),
        ids_(ids) {}

  // Any bytes: valid stretches and single bytes in turn.
  Status encode_bytes(std::string_view bytes) {
    size_t pos = 0;
    while (pos < bytes.size()) {
      const size_t valid = utf8_valid_prefix_bytes(bytes.substr(pos));
      if (valid > 0) CA_RETURN_IF_ERROR(encode_text(bytes.substr(pos, valid), pos));
      pos += valid;
      if (pos < bytes.size()) ids_.push_back(bpe_.byte_token(static_cast<uint8_t>(bytes[pos++])));
    }
    return {};
  }

 private:
  // Calls `rest` on the text between added tokens, and writes the ids of these.
  template <class Rest>
  Status cut_at_added_tokens(const AddedTokenFinder& finder, std::string_view text, std::span<const ByteRange> control,
                             size_t offset, Rest rest) {
    size_t pos = 0;
    while (pos < text.size()) {
      const std::optional<AddedTokenFinder::Match> match = finder.find(text, pos, control, offset);
      const size_t end = match ? match->begin : text.size();
      if (end > pos) CA_RETURN_IF_ERROR(rest(text.substr(pos, end - pos), offset + pos));
      if (!match) break;
      ids_.push_back(match->id);
      pos = match->end;
    }
    return {};
  }

  Status encode_text(std::string_view text, size_t offset) {
    return cut_at_added_tokens(before_normalizer_, text, control_, offset, [this](std::string_view part, size_t at) {
      if (!normalize_nfc_ || is_trivially_nfc(part)) return encode_normalized(part, at, control_);
      const std::string normalized = to_nfc(part);
      return encode_normalized(normalized, 0, {});
    });
  }

  Status encode_normalized(std::string_view text, size_t offset, std::span<const ByteRange> control) {
    return cut_at_added_tokens(after_normalizer_, text, control, offset,
                               [this](std::string_view part, size_t) { return encode_words(part); });
  }

  Status encode_words(std::string_view text) {
    CA_RETURN_IF_ERROR(pre_tokenizer_.split(text, pre_tokenizer_scratch_, words_));
    for (const std::string_view word : words_) bpe_.encode(vocabulary_, word, bpe_scratch_, ids_);
    return {};
  }

  const Vocabulary& vocabulary_;
  const Bpe& bpe_;
  const PreTokenizer& pre_tokenizer_;
  const AddedTokenFinder& before_normalizer_;
  const AddedTokenFinder& after_normalizer_;
  const bool normalize_nfc_;
  const std::span<const ByteRange> control_;
  std::vector<int32_t>& ids_;

  PreTokenizer::Scratch pre_tokenizer_scratch_;
  Bpe::Scratch bpe_scratch_;
  std::vector<std::string_view> words_;
};

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Result<std::vector<int32_t>> Tokenizer::encode(std::string_view bytes, bool add_special_tokens) const {
  const TextSegment whole{std::string(bytes), /*is_control=*/true};
  return encode_segments({&whole, 1}, add_special_tokens);
}

Result<std::vector<int32_t>> Tokenizer::encode_segments(std::span<const TextSegment> segments,
                                                        bool add_special_tokens) const {
  // Words may cross the border of two segments ("\n" + "\n"), so the text is joined first and the borders are kept.
  std::string joined;
  std::vector<ByteRange> control;
  size_t num_bytes = 0;
  for (const TextSegment& segment : segments) {
    if (segment.is_control) control.push_back({num_bytes, num_bytes + segment.text.size()});
    num_bytes += segment.text.size();
  }
  if (num_bytes > static_cast<size_t>(kMaxTextBytes)) {
    return invalid_argument(fmt::format("text of {} bytes; allowed: {}", num_bytes, kMaxTextBytes));
  }
  std::string_view text = segments.empty() ? std::string_view() : std::string_view(segments.front().text);
  if (segments.size() > 1) {
    joined.reserve(num_bytes);
    for (const TextSegment& segment : segments) joined += segment.text;
    text = joined;
  }

  std::vector<int32_t> ids;
  ids.reserve(num_bytes / 3 + 16);
  if (add_special_tokens) ids.insert(ids.end(), impl_->prefix_ids.begin(), impl_->prefix_ids.end());
  Encoder encoder(impl_->vocabulary, *impl_->bpe, *impl_->pre_tokenizer, impl_->added_before_normalizer,
                  impl_->added_after_normalizer, impl_->normalize_nfc, control, ids);
  CA_RETURN_IF_ERROR(encoder.encode_bytes(text));
  if (add_special_tokens) ids.insert(ids.end(), impl_->suffix_ids.begin(), impl_->suffix_ids.end());
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  std::string bytes;
  for (const int32_t id : ids) {
    if (const auto added = impl_->added_by_id.find(id); added != impl_->added_by_id.end()) {
      if (!skip_special_tokens || !added->second.is_special) bytes += added->second.content;
    } else if (const std::optional<std::string_view> token = impl_->vocabulary.bytes_of(id)) {
      bytes += *token;
    }
  }
  return bytes;
}

std::optional<int32_t> Tokenizer::token_id(std::string_view token) const {
  if (const auto added = impl_->added_by_content.find(std::string(token)); added != impl_->added_by_content.end()) {
    return added->second;
  }
  return impl_->vocabulary.find_spelling(token);
}

bool Tokenizer::is_special(int32_t id) const {
  const auto added = impl_->added_by_id.find(id);
  return added != impl_->added_by_id.end() && added->second.is_special;
}

int32_t Tokenizer::vocab_size() const { return impl_->vocab_size; }

}  // namespace compact::engine
