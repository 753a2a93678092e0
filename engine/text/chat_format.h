/// The built-in chat formats: how messages become the text a chat model was trained on.
///
/// A checkpoint describes its format by a Jinja template. We do not run templates: the families this engine serves have
/// two formats between them, and these are written here. An unknown template is an error, never a guess.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "compact/status.h"
#include "engine/text/tokenizer.h"

namespace compact::engine {

enum class ChatFormat {
  kNone,    ///< the text as it is; its author writes control tokens, if any
  kLlama3,  ///< <|start_header_id|>role<|end_header_id|> .. <|eot_id|>; contents are stripped of white space at both
            ///< ends
  kChatMl,  ///< <|im_start|>role .. <|im_end|>; no system message unless one is given
  kQwen3,   ///< kChatMl with thinking switched off: the answer starts behind an empty <think> block
};
// Llama-3.1 and later: their templates put "Cutting Knowledge Date: .." and "Today Date: .." before the system message.
// kLlama3 leaves both out: the same messages then give the same ids on any day, and a cached prefix stays valid. Who
// wants them writes them at the start of the system message; the rendered text is then the template's.

struct ChatMessage {
  std::string role;  ///< "system", "user" or "assistant"
  std::string content;
};

/// Messages as text for Tokenizer::encode_segments.
struct ChatPrompt {
  std::vector<TextSegment> segments;  ///< what users wrote is not control text
  bool add_special_tokens = false;    ///< what to pass to encode_segments; false where the format begins with them
};

/// Name of a format as users write it: none, llama3, chatml, qwen3. Static storage.
[[nodiscard]] const char* chat_format_name(ChatFormat format) noexcept;

/// Errors: kInvalidArgument for an unknown name; the message lists the known ones.
[[nodiscard]] Result<ChatFormat> parse_chat_format(std::string_view name);

/// Recognises a format by the control tokens that its Jinja template writes.
/// Errors: kUnsupported for a template of another family; the message lists the formats and names `--chat none`.
[[nodiscard]] Result<ChatFormat> detect_chat_format(std::string_view chat_template);

/// Detects the format of a checkpoint from chat_template.jinja or, without it, from tokenizer_config.json; kNone if
/// neither has a template, as for a base model.
/// Errors: those of detect_chat_format; kIoError for a malformed file.
[[nodiscard]] Result<ChatFormat> load_chat_format(const std::filesystem::path& model_dir);

/// Renders messages up to where the assistant's answer begins. The last message must be the user's.
/// Errors: kInvalidArgument for no messages, another role, another last role, or for kNone anything but one user
/// message.
[[nodiscard]] Result<ChatPrompt> format_chat(ChatFormat format, std::span<const ChatMessage> messages);

/// The same for one question; an empty `system` means none.
[[nodiscard]] Result<ChatPrompt> format_chat(ChatFormat format, std::string_view user, std::string_view system = {});

/// The segments joined.
[[nodiscard]] std::string prompt_text(const ChatPrompt& prompt);

/// The token that ends a turn, where generation stops; empty for kNone.
[[nodiscard]] std::string_view chat_turn_end(ChatFormat format) noexcept;

/// Checks that a tokenizer has the control tokens of a format: without them they would be encoded as plain text.
/// Errors: kInvalidArgument naming the token that is missing.
[[nodiscard]] Status check_chat_format(ChatFormat format, const Tokenizer& tokenizer);

}  // namespace compact::engine
