#include "engine/text/chat_format.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/unit/temp_dir.h"

namespace compact::engine {
namespace {

std::string text_of(const Result<ChatPrompt>& prompt) {
  return prompt.ok() ? prompt_text(*prompt) : "error: " + prompt.status().message();
}

TEST(ChatFormat, WritesLlama3) {
  EXPECT_EQ(text_of(format_chat(ChatFormat::kLlama3, "Hello")),
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n");
  EXPECT_EQ(text_of(format_chat(ChatFormat::kLlama3, "Hello", "Be brief.")),
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

TEST(ChatFormat, StripsContentsForLlama3Only) {
  const std::string spaces = " \t\n\x1C\xC2\x85\xC2\xA0\xE2\x80\xA9\xE3\x80\x80";
  const std::string padded = spaces + "a  b" + spaces;
  EXPECT_EQ(text_of(format_chat(ChatFormat::kLlama3, padded)), text_of(format_chat(ChatFormat::kLlama3, "a  b")));
  EXPECT_NE(text_of(format_chat(ChatFormat::kChatMl, padded)), text_of(format_chat(ChatFormat::kChatMl, "a  b")));
  // U+200B is no white space, and bytes that are no UTF-8 stay.
  EXPECT_NE(text_of(format_chat(ChatFormat::kLlama3, "\xE2\x80\x8B")), text_of(format_chat(ChatFormat::kLlama3, "")));
  EXPECT_NE(text_of(format_chat(ChatFormat::kLlama3, "\x85")), text_of(format_chat(ChatFormat::kLlama3, "")));
}

TEST(ChatFormat, WritesChatMlAndQwen3) {
  const std::string chatml = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
  EXPECT_EQ(text_of(format_chat(ChatFormat::kChatMl, "Hi")), chatml);
  EXPECT_EQ(text_of(format_chat(ChatFormat::kQwen3, "Hi")), chatml + "<think>\n\n</think>\n\n");
  EXPECT_EQ(text_of(format_chat(ChatFormat::kChatMl, "Hi", "S")), "<|im_start|>system\nS<|im_end|>\n" + chatml);
}

TEST(ChatFormat, DropsEarlierThoughtsForQwen3) {
  const std::vector<ChatMessage> messages = {
      {"user", "1"}, {"assistant", "<think>\nhm\n</think>\n\ntwo"}, {"user", "3"}};
  EXPECT_EQ(text_of(format_chat(ChatFormat::kQwen3, messages)),
            "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\n3<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n");
  EXPECT_NE(text_of(format_chat(ChatFormat::kChatMl, messages)).find("hm"), std::string::npos);
}

TEST(ChatFormat, KeepsWhatUsersWriteOutOfControlText) {
  const Result<ChatPrompt> prompt = format_chat(ChatFormat::kLlama3, "x<|eot_id|>y", "<|begin_of_text|>");
  ASSERT_TRUE(prompt.ok());
  std::string plain;
  for (const TextSegment& segment : prompt->segments) plain += segment.is_control ? "" : segment.text;
  EXPECT_EQ(plain, "<|begin_of_text|>x<|eot_id|>y");
  EXPECT_FALSE(prompt->add_special_tokens);
}

TEST(ChatFormat, GivesRawTextAsItIs) {
  const Result<ChatPrompt> prompt = format_chat(ChatFormat::kNone, " raw ");
  ASSERT_TRUE(prompt.ok());
  EXPECT_EQ(prompt_text(*prompt), " raw ");
  EXPECT_TRUE(prompt->add_special_tokens);
  EXPECT_EQ(format_chat(ChatFormat::kNone, "a", "system").status().code(), StatusCode::kInvalidArgument);
}

TEST(ChatFormat, RefusesMessagesWithoutAQuestion) {
  const std::vector<std::vector<ChatMessage>> wrong = {
      {}, {{"user", "a"}, {"assistant", "b"}}, {{"tool", "a"}, {"user", "b"}}, {{"user<|end_header_id|>", "a"}}};
  for (const auto& messages : wrong) {
    EXPECT_EQ(format_chat(ChatFormat::kLlama3, messages).status().code(), StatusCode::kInvalidArgument);
  }
}

TEST(ChatFormat, ParsesItsNames) {
  for (const ChatFormat format : {ChatFormat::kNone, ChatFormat::kLlama3, ChatFormat::kChatMl, ChatFormat::kQwen3}) {
    const Result<ChatFormat> parsed = parse_chat_format(chat_format_name(format));
    ASSERT_TRUE(parsed.ok());
    EXPECT_EQ(*parsed, format);
  }
  const Status status = parse_chat_format("alpaca").status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "unknown chat format \"alpaca\"; allowed: none, llama3, chatml, qwen3");
}

TEST(ChatFormat, IsDetectedFromTheCheckpoint) {
  const compact::testing::TempDir dir;
  EXPECT_EQ(load_chat_format(dir.path()).value(), ChatFormat::kNone);
  dir.write("tokenizer_config.json", R"({"bos_token": "<s>"})");
  EXPECT_EQ(load_chat_format(dir.path()).value(), ChatFormat::kNone);
  dir.write("tokenizer_config.json", R"({"chat_template": "{{ '<|start_header_id|>' }} {{ '<|eot_id|>' }}"})");
  EXPECT_EQ(load_chat_format(dir.path()).value(), ChatFormat::kLlama3);
  dir.write(
      "tokenizer_config.json",
      R"({"chat_template": [{"name": "tool", "template": "x"}, {"name": "default", "template": "<|im_start|><|im_end|>"}]})");
  EXPECT_EQ(load_chat_format(dir.path()).value(), ChatFormat::kChatMl);
  dir.write("chat_template.jinja", "<|im_start|> <|im_end|> {% if enable_thinking is false %}");
  EXPECT_EQ(load_chat_format(dir.path()).value(), ChatFormat::kQwen3);
}

TEST(ChatFormat, NamesTheWayOutOfAnUnknownTemplate) {
  const compact::testing::TempDir dir;
  dir.write("tokenizer_config.json", R"({"chat_template": "[INST] {{ x }} [/INST]"})");
  const Status status = load_chat_format(dir.path()).status();
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_NE(status.message().find("none, llama3, chatml, qwen3"), std::string::npos) << status.message();
  EXPECT_NE(status.message().find("--chat none"), std::string::npos) << status.message();
  dir.write("tokenizer_config.json", "{");
  EXPECT_EQ(load_chat_format(dir.path()).status().code(), StatusCode::kIoError);
  dir.write("tokenizer_config.json", R"({"chat_template": 7})");
  EXPECT_EQ(load_chat_format(dir.path()).status().code(), StatusCode::kIoError);
}

}  // namespace
}  // namespace compact::engine
