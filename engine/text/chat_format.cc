#include "engine/text/chat_format.h"

#include <fmt/format.h>

#include <array>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>

#include "engine/text/utf8.h"

namespace compact::engine {
namespace {

constexpr std::string_view kFormats = "none, llama3, chatml, qwen3";
constexpr std::array kAllFormats = {ChatFormat::kNone, ChatFormat::kLlama3, ChatFormat::kChatMl, ChatFormat::kQwen3};

// Python's str.strip(), which templates call: Unicode white space and the four separators U+001C to U+001F.
bool is_strip_space(uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_space_sequence(std::string_view bytes, size_t length) {
  return bytes.size() >= length && utf8_sequence_bytes(bytes.substr(0, length)) == static_cast<int32_t>(length) &&
         is_strip_space(utf8_code_point(bytes, static_cast<int32_t>(length)));
}

std::string_view strip(std::string_view text) {
  // White space takes 1 to 3 bytes in UTF-8; no form is a suffix of another.
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t length = 1; length <= 3; ++length) {
      if (is_space_sequence(text, length)) {
        text.remove_prefix(length);
        changed = true;
      }
      if (text.size() >= length && is_space_sequence(text.substr(text.size() - length), length)) {
        text.remove_suffix(length);
        changed = true;
      }
    }
  }
  return text;
}

// Qwen3's template drops the thoughts of earlier answers.
std::string_view without_thoughts(std::string_view answer) {
  constexpr std::string_view kEnd = "</think>";
  const size_t end = answer.rfind(kEnd);
  if (end == std::string_view::npos) return answer;
  answer.remove_prefix(end + kEnd.size());
  while (answer.starts_with('\n')) answer.remove_prefix(1);
  return answer;
}

Status check_messages(std::span<const ChatMessage> messages) {
  if (messages.empty()) return invalid_argument("a chat without messages; allowed: at least one, from the user");
  for (const ChatMessage& message : messages) {
    if (message.role != "system" && message.role != "user" && message.role != "assistant") {
      return invalid_argument(fmt::format("message with role \"{}\"; allowed: system, user, assistant", message.role));
    }
  }
  if (messages.back().role != "user") {
    return invalid_argument(fmt::format("the last message has role \"{}\"; allowed: user", messages.back().role));
  }
  return {};
}

class PromptWriter {
 public:
  void control(std::string_view text) { append(text, true); }
  void content(std::string_view text) { append(text, false); }
  ChatPrompt take(bool add_special_tokens) { return {std::move(segments_), add_special_tokens}; }

 private:
  void append(std::string_view text, bool is_control) {
    if (text.empty()) return;
    if (segments_.empty() || segments_.back().is_control != is_control) segments_.push_back({{}, is_control});
    segments_.back().text += text;
  }

  std::vector<TextSegment> segments_;
};

// NOTE: the role is one of three known words here, so it may stand in control text.
ChatPrompt format_llama3(std::span<const ChatMessage> messages) {
  PromptWriter writer;
  writer.control("<|begin_of_text|>");
  for (const ChatMessage& message : messages) {
    writer.control(fmt::format("<|start_header_id|>{}<|end_header_id|>\n\n", message.role));
    writer.content(strip(message.content));
    writer.control("<|eot_id|>");
  }
  writer.control("<|start_header_id|>assistant<|end_header_id|>\n\n");
  return writer.take(/*add_special_tokens=*/false);
}

ChatPrompt format_chatml(std::span<const ChatMessage> messages, bool is_qwen3) {
  PromptWriter writer;
  for (const ChatMessage& message : messages) {
    writer.control(fmt::format("<|im_start|>{}\n", message.role));
    writer.content(is_qwen3 && message.role == "assistant" ? without_thoughts(message.content) : message.content);
    writer.control("<|im_end|>\n");
  }
  writer.control("<|im_start|>assistant\n");
  if (is_qwen3) writer.control("<think>\n\n</think>\n\n");
  return writer.take(/*add_special_tokens=*/false);
}

// The content of a file; none if there is no such file.
std::optional<std::string> read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return std::nullopt;
  return std::string{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// The key chat_template is a string, or a list of named templates of which "default" is meant.
Result<std::string> template_of_config(const std::string& text, const std::string& name) {
  const nlohmann::json config = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) return io_error(fmt::format("{}: expected a JSON object", name));
  const auto entry = config.find("chat_template");
  if (entry == config.end() || entry->is_null()) return std::string();
  if (entry->is_string()) return entry->get<std::string>();
  if (entry->is_array()) {
    for (const nlohmann::json& named : *entry) {
      const auto template_name = named.find("name");
      const auto body = named.find("template");
      if (template_name != named.end() && *template_name == "default" && body != named.end() && body->is_string()) {
        return body->get<std::string>();
      }
    }
  }
  return io_error(fmt::format("{}: key \"chat_template\": expected a string or a list with a \"default\", found {}",
                              name, entry->type_name()));
}

}  // namespace

const char* chat_format_name(ChatFormat format) noexcept {
  switch (format) {
    case ChatFormat::kNone: return "none";
    case ChatFormat::kLlama3: return "llama3";
    case ChatFormat::kChatMl: return "chatml";
    case ChatFormat::kQwen3: return "qwen3";
  }
  return "unknown chat format";
}

Result<ChatFormat> parse_chat_format(std::string_view name) {
  for (const ChatFormat format : kAllFormats) {
    if (name == chat_format_name(format)) return format;
  }
  return invalid_argument(fmt::format("unknown chat format \"{}\"; allowed: {}", name, kFormats));
}

Result<ChatFormat> detect_chat_format(std::string_view chat_template) {
  const auto has = [chat_template](std::string_view text) {
    return chat_template.find(text) != std::string_view::npos;
  };
  if (has("<|start_header_id|>") && has("<|eot_id|>")) return ChatFormat::kLlama3;
  if (has("<|im_start|>") && has("<|im_end|>"))
    return has("enable_thinking") ? ChatFormat::kQwen3 : ChatFormat::kChatMl;
  return unsupported(
      fmt::format("the chat template of this model belongs to no known family; built-in formats: {} (choose with "
                  "--chat NAME, or give "
                  "rendered text with --chat none)",
                  kFormats));
}

Result<ChatFormat> load_chat_format(const std::filesystem::path& model_dir) {
  std::string chat_template;
  std::filesystem::path source = model_dir / "chat_template.jinja";  // where both exist this one counts
  if (std::optional<std::string> text = read_file(source)) {
    chat_template = std::move(*text);
  } else {
    source = model_dir / "tokenizer_config.json";
    text = read_file(source);
    if (!text) return ChatFormat::kNone;
    CA_ASSIGN_OR_RETURN(chat_template, template_of_config(*text, source.string()));
  }
  if (chat_template.empty()) return ChatFormat::kNone;
  const Result<ChatFormat> format = detect_chat_format(chat_template);
  if (format.ok()) return format;
  return Status(format.status().code(), fmt::format("{}: {}", source.string(), format.status().message()));
}

Result<ChatPrompt> format_chat(ChatFormat format, std::span<const ChatMessage> messages) {
  CA_RETURN_IF_ERROR(check_messages(messages));
  switch (format) {
    case ChatFormat::kNone:
      if (messages.size() != 1) {
        return invalid_argument(
            fmt::format("{} messages with chat format none; allowed: one, from the user (other formats: {})",
                        messages.size(), kFormats));
      }
      return ChatPrompt{{{messages[0].content, /*is_control=*/true}}, /*add_special_tokens=*/true};
    case ChatFormat::kLlama3: return format_llama3(messages);
    case ChatFormat::kChatMl: return format_chatml(messages, /*is_qwen3=*/false);
    case ChatFormat::kQwen3: return format_chatml(messages, /*is_qwen3=*/true);
  }
  return invalid_argument(fmt::format("unknown chat format {}; allowed: {}", static_cast<int>(format), kFormats));
}

Result<ChatPrompt> format_chat(ChatFormat format, std::string_view user, std::string_view system) {
  std::vector<ChatMessage> messages;
  if (!system.empty()) messages.push_back({"system", std::string(system)});
  messages.push_back({"user", std::string(user)});
  return format_chat(format, messages);
}

std::string prompt_text(const ChatPrompt& prompt) {
  std::string text;
  for (const TextSegment& segment : prompt.segments) text += segment.text;
  return text;
}

std::string_view chat_turn_end(ChatFormat format) noexcept {
  switch (format) {
    case ChatFormat::kNone: return {};
    case ChatFormat::kLlama3: return "<|eot_id|>";
    case ChatFormat::kChatMl:
    case ChatFormat::kQwen3: return "<|im_end|>";
  }
  return {};
}

Status check_chat_format(ChatFormat format, const Tokenizer& tokenizer) {
  static constexpr std::string_view kLlama3Tokens[] = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                                                       "<|eot_id|>"};
  static constexpr std::string_view kChatMlTokens[] = {"<|im_start|>", "<|im_end|>"};
  static constexpr std::string_view kQwen3Tokens[] = {"<|im_start|>", "<|im_end|>", "<think>", "</think>"};
  std::span<const std::string_view> wanted;
  if (format == ChatFormat::kLlama3) wanted = kLlama3Tokens;
  if (format == ChatFormat::kChatMl) wanted = kChatMlTokens;
  if (format == ChatFormat::kQwen3) wanted = kQwen3Tokens;
  for (const std::string_view token : wanted) {
    if (!tokenizer.token_id(token)) {
      return invalid_argument(fmt::format("chat format {} needs the token {}, which this tokenizer lacks; allowed: {}",
                                          chat_format_name(format), token, kFormats));
    }
  }
  return {};
}

}  // namespace compact::engine
