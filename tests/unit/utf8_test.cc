#include "engine/text/utf8.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

namespace compact::engine {
namespace {

using namespace std::string_literals;

TEST(Utf8, TakesSequencesAtTheEdgesOfEachLength) {
  for (const uint32_t code_point :
       {0x0u, 0x7Fu, 0x80u, 0x7FFu, 0x800u, 0xD7FFu, 0xE000u, 0xFFFFu, 0x10000u, 0x10FFFFu}) {
    std::string bytes;
    append_utf8(code_point, bytes);
    EXPECT_EQ(utf8_sequence_bytes(bytes), static_cast<int32_t>(bytes.size())) << std::hex << code_point;
    EXPECT_EQ(utf8_code_point(bytes, static_cast<int32_t>(bytes.size())), code_point);
    EXPECT_EQ(utf8_sequence_bytes(std::string_view(bytes).substr(0, bytes.size() - 1)), 0) << std::hex << code_point;
  }
}

TEST(Utf8, RefusesOverlongsSurrogatesAndBeyondTheLastCharacter) {
  for (const std::string& bytes : {"\xC0\x80"s, "\xC1\xBF"s, "\xE0\x9F\xBF"s, "\xF0\x8F\xBF\xBF"s, "\xED\xA0\x80"s,
                                   "\xED\xBF\xBF"s, "\xF4\x90\x80\x80"s, "\xF5\x80\x80\x80"s, "\x80"s, "\xFF"s, ""s}) {
    EXPECT_EQ(utf8_sequence_bytes(bytes), 0) << testing::PrintToString(bytes);
  }
}

TEST(Utf8, FindsTheValidPrefix) {
  EXPECT_EQ(utf8_valid_prefix_bytes(""), 0u);
  EXPECT_EQ(utf8_valid_prefix_bytes("0123456789abcdef\xC3\xA9"), 18u);
  EXPECT_EQ(utf8_valid_prefix_bytes("0123456789abcdef\xC3"), 16u);
  EXPECT_EQ(utf8_valid_prefix_bytes("01234\xFF"
                                    "6789abcdef"),
            5u);
}

// Unicode 15, table 3-8 and its neighbours: one U+FFFD per maximal part that could have begun a character.
TEST(Utf8Stream, ReplacesMaximalIllFormedParts) {
  struct Case {
    std::string bytes;
    std::string shown;
  };
  const std::string r = "\xEF\xBF\xBD";
  for (const Case& c :
       std::vector<Case>{{"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", r + r + r + r + r + r + r + r + "A"},
                         {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", r + r + r + r + r + r + r + r + "A"},
                         {"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", r + r + r + r + r + "A" + r + r + "B"},
                         {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", r + r + r + r + "A"},
                         {"a\xE2\x82", "a" + r}}) {
    Utf8Stream at_once;
    std::string whole = at_once.push(c.bytes);
    whole += at_once.finish();
    EXPECT_EQ(whole, c.shown);
    Utf8Stream in_steps;
    std::string shown;
    for (const char byte : c.bytes) shown += in_steps.push({&byte, 1});
    EXPECT_EQ(shown + in_steps.finish(), c.shown);
  }
}

TEST(Utf8Stream, HoldsACutCharacterBack) {
  Utf8Stream stream;
  EXPECT_EQ(stream.push("x\xF0\x9F"), "x");
  EXPECT_EQ(stream.push("\x98"), "");
  EXPECT_EQ(stream.push("\x80y"), "\xF0\x9F\x98\x80y");
  EXPECT_EQ(stream.finish(), "");
}

}  // namespace
}  // namespace compact::engine
