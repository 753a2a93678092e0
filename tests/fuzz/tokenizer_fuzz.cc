// Input: a tokenizer.json, a zero byte, a text. The file must be read or refused, never crash; where it is read, the
// text must encode to ids that decode to the same bytes if nothing in the file may change them. A text alone (no zero
// byte) goes through UTF-8 scanning and streaming.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "engine/text/chat_format.h"
#include "engine/text/tokenizer.h"
#include "engine/text/utf8.h"

namespace {

using namespace compact::engine;

void require(bool holds) {
  if (!holds) std::abort();
}

void check_stream(std::string_view text) {
  Utf8Stream at_once;
  std::string whole = at_once.push(text);
  whole += at_once.finish();
  Utf8Stream in_steps;
  std::string pieces;
  for (const char byte : text) pieces += in_steps.push({&byte, 1});
  pieces += in_steps.finish();
  require(whole == pieces);
  require(utf8_valid_prefix_bytes(whole) == whole.size());
  if (utf8_valid_prefix_bytes(text) == text.size()) require(whole == text);
}

void check_tokenizer(std::string_view json, std::string_view text) {
  const compact::Result<Tokenizer> tokenizer = Tokenizer::parse(json, "fuzz");
  if (!tokenizer.ok()) return;
  const TextSegment segments[] = {{std::string(text.substr(0, text.size() / 2)), true},
                                  {std::string(text.substr(text.size() / 2)), false}};
  const compact::Result<std::vector<int32_t>> ids = tokenizer->encode_segments(segments, true);
  const compact::Result<std::vector<int32_t>> plain = tokenizer->encode(text, false);
  if (!plain.ok() || !ids.ok()) return;
  for (const int32_t id : *ids) require(id >= 0 && id < tokenizer->vocab_size());
  const bool may_change_text = json.find("NFC") != std::string_view::npos ||
                               json.find('\\') != std::string_view::npos ||
                               json.find("add_prefix_space\":false") == std::string_view::npos;
  if (!may_change_text) require(tokenizer->decode(*plain, false) == text);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t border = input.find('\0');
  if (border == std::string_view::npos) {
    check_stream(input);
    (void)detect_chat_format(input);
    for (const ChatFormat format : {ChatFormat::kLlama3, ChatFormat::kChatMl, ChatFormat::kQwen3}) {
      (void)format_chat(format, input, input);
    }
  } else {
    check_tokenizer(input.substr(0, border), input.substr(border + 1));
  }
  return 0;
}
