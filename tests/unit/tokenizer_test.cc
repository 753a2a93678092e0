#include "engine/text/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "engine/text/byte_level.h"
#include "engine/text/chat_format.h"
#include "engine/text/regex_dialect.h"
#include "tests/unit/temp_dir.h"

namespace compact::engine {
namespace {

using Json = nlohmann::json;
using Ids = std::vector<int32_t>;

constexpr const char* kLlama3Rule =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

constexpr int32_t kHe = 256, kLl = 257, kHell = 258, kHello = 259, kSpaceH = 260, kBegin = 261, kEot = 262, kTool = 263;

// Ids 0 to 255 are the bytes; a few merges and three added tokens follow.
Json small_tokenizer() {
  Json vocab = Json::object();
  for (int byte = 0; byte < 256; ++byte) {
    const char text = static_cast<char>(byte);
    vocab[byte_level_spell({&text, 1})] = byte;
  }
  vocab["he"] = kHe;
  vocab["ll"] = kLl;
  vocab["hell"] = kHell;
  vocab["hello"] = kHello;
  vocab["\u0120h"] = kSpaceH;
  const auto added = [](int32_t id, const char* content, bool special) {
    return Json{{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
                {"rstrip", false}, {"normalized", false}, {"special", special}};
  };
  return Json{
      {"added_tokens",
       {added(kBegin, "<|begin_of_text|>", true), added(kEot, "<|eot_id|>", true), added(kTool, "<tool>", false)}},
      {"normalizer", nullptr},
      {"pre_tokenizer",
       {{"type", "Sequence"},
        {"pretokenizers",
         {{{"type", "Split"}, {"pattern", {{"Regex", kLlama3Rule}}}, {"behavior", "Isolated"}, {"invert", false}},
          {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}}}}}},
      {"post_processor",
       {{"type", "TemplateProcessing"},
        {"single",
         {{{"SpecialToken", {{"id", "<|begin_of_text|>"}, {"type_id", 0}}}},
          {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}},
        {"special_tokens",
         {{"<|begin_of_text|>",
           {{"id", "<|begin_of_text|>"}, {"ids", {kBegin}}, {"tokens", {"<|begin_of_text|>"}}}}}}}},
      {"decoder", {{"type", "ByteLevel"}}},
      {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"h e", "l l", "he ll", "\u0120 h"}}}}};
}

Result<Tokenizer> parse(const Json& json) { return Tokenizer::parse(json.dump(), "tokenizer.json"); }

Tokenizer make(const Json& json) {
  Result<Tokenizer> tokenizer = parse(json);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  return std::move(tokenizer).value();
}

Ids encode(const Tokenizer& tokenizer, std::string_view text, bool add_special_tokens = false) {
  const Result<Ids> ids = tokenizer.encode(text, add_special_tokens);
  EXPECT_TRUE(ids.ok()) << ids.status().message();
  return ids.ok() ? *ids : Ids{};
}

void expect_refused(const Json& json, StatusCode code, std::string_view part_of_message) {
  const Result<Tokenizer> tokenizer = parse(json);
  ASSERT_FALSE(tokenizer.ok()) << "should contain: " << part_of_message;
  EXPECT_EQ(tokenizer.status().code(), code) << tokenizer.status().message();
  EXPECT_NE(tokenizer.status().message().find(part_of_message), std::string::npos) << tokenizer.status().message();
  EXPECT_EQ(tokenizer.status().message().find("tokenizer.json: "), 0u) << tokenizer.status().message();
}

TEST(Tokenizer, MergesByRank) {
  const Tokenizer tokenizer = make(small_tokenizer());
  EXPECT_EQ(encode(tokenizer, "hello"), (Ids{kHell, 'o'}));
  EXPECT_EQ(encode(tokenizer, " hello"), (Ids{' ', kHell, 'o'}));  // "h e" ranks before " h"
  EXPECT_EQ(encode(tokenizer, " ho"), (Ids{kSpaceH, 'o'}));
  EXPECT_EQ(encode(tokenizer, "llll"), (Ids{kLl, kLl}));
  EXPECT_EQ(encode(tokenizer, ""), Ids{});
  EXPECT_EQ(tokenizer.vocab_size(), 264);
}

TEST(Tokenizer, TakesMergesAsPairs) {
  Json json = small_tokenizer();
  json["model"]["merges"] = Json::parse(R"([["h", "e"], ["l", "l"], ["he", "ll"]])");
  EXPECT_EQ(encode(make(json), "hello"), (Ids{kHell, 'o'}));
}

TEST(Tokenizer, TakesAWholeWordWhereMergesAreIgnored) {
  Json json = small_tokenizer();
  json["model"]["ignore_merges"] = true;
  const Tokenizer tokenizer = make(json);
  EXPECT_EQ(encode(tokenizer, "hello"), Ids{kHello});
  EXPECT_EQ(encode(tokenizer, "helloo"), (Ids{kHell, 'o', 'o'}));
}

TEST(Tokenizer, PutsTheTemplateAroundTheText) {
  const Tokenizer tokenizer = make(small_tokenizer());
  EXPECT_EQ(encode(tokenizer, "ho", true), (Ids{kBegin, 'h', 'o'}));
  EXPECT_EQ(encode(tokenizer, "", true), Ids{kBegin});
}

TEST(Tokenizer, RecognisesSpecialTokensInControlTextOnly) {
  const Tokenizer tokenizer = make(small_tokenizer());
  EXPECT_EQ(encode(tokenizer, "a<|eot_id|>b"), (Ids{'a', kEot, 'b'}));
  const std::vector<TextSegment> segments = {
      {"<|eot_id|>", true}, {"<|eot_id|><tool>", false}, {"<|eot_", false}, {"id|>", true}};
  const Ids ids = tokenizer.encode_segments(segments, false).value();
  EXPECT_EQ(std::count(ids.begin(), ids.end(), kEot), 1);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), kTool), 1);
  EXPECT_EQ(ids.front(), kEot);
  EXPECT_EQ(tokenizer.decode(ids, /*skip_special_tokens=*/false), "<|eot_id|><|eot_id|><tool><|eot_id|>");
}

TEST(Tokenizer, DoesNotLetUserTextHideAControlToken) {
  Json json = small_tokenizer();
  json["added_tokens"].push_back({{"id", 264}, {"content", "x<|eot_id|>"}, {"special", true}, {"normalized", false}});
  const Tokenizer tokenizer = make(json);
  const std::vector<TextSegment> segments = {{"x", false}, {"<|eot_id|>", true}};
  EXPECT_EQ(tokenizer.encode_segments(segments, false).value(), (Ids{'x', kEot}));
  EXPECT_EQ(encode(tokenizer, "x<|eot_id|>"), Ids{264});
}

TEST(Tokenizer, EncodesSegmentsLikeTheirJoinedText) {
  const Tokenizer tokenizer = make(small_tokenizer());
  const std::vector<TextSegment> segments = {{"he", true}, {"ll", false}, {"o\n", true}, {"\n", false}};
  EXPECT_EQ(tokenizer.encode_segments(segments, false).value(), encode(tokenizer, "hello\n\n"));
  EXPECT_EQ(tokenizer.encode_segments({}, true).value(), Ids{kBegin});
}

TEST(Tokenizer, SkipsSpecialTokensWhenDecodingForPeople) {
  const Tokenizer tokenizer = make(small_tokenizer());
  const Ids ids = {kBegin, kHell, 'o', kTool, kEot, -1, 999999};
  EXPECT_EQ(tokenizer.decode(ids), "hello<tool>");
  EXPECT_EQ(tokenizer.decode(ids, false), "<|begin_of_text|>hello<tool><|eot_id|>");
}

TEST(Tokenizer, NamesTokens) {
  const Tokenizer tokenizer = make(small_tokenizer());
  EXPECT_EQ(tokenizer.token_id("<|eot_id|>"), kEot);
  EXPECT_EQ(tokenizer.token_id("\u0120h"), kSpaceH);
  EXPECT_EQ(tokenizer.token_id("nothing"), std::nullopt);
  EXPECT_TRUE(tokenizer.is_special(kEot));
  EXPECT_FALSE(tokenizer.is_special(kTool));
  EXPECT_FALSE(tokenizer.is_special('a'));
}

TEST(Tokenizer, LosesNoByte) {
  const Tokenizer tokenizer = make(small_tokenizer());
  EXPECT_EQ(encode(tokenizer, "h\xE2\x82h"), (Ids{'h', 0xE2, 0x82, 'h'}));
  EXPECT_EQ(encode(tokenizer, "he\xFFll"), (Ids{kHe, 0xFF, kLl}));
  std::mt19937 random(1);
  for (int round = 0; round < 2000; ++round) {
    std::string bytes(random() % 64, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random() % 4 == 0 ? random() : "hel o'\n<"[random() % 8]);
    ASSERT_EQ(tokenizer.decode(encode(tokenizer, bytes)), bytes) << "round " << round;
  }
}

TEST(Tokenizer, ComposesUnderNfc) {
  Json json = small_tokenizer();
  json["normalizer"] = {{"type", "Sequence"}, {"normalizers", {{{"type", "NFC"}}}}};
  const Tokenizer tokenizer = make(json);
  EXPECT_EQ(encode(tokenizer, "e\u0301"), encode(tokenizer, "\u00e9"));
  EXPECT_EQ(encode(tokenizer, "e\u0301\xFF"), (Ids{0xC3, 0xA9, 0xFF}));
  // A mark of Unicode 12: the reference does not know its class, and so moves nothing across it.
  EXPECT_EQ(tokenizer.decode(encode(tokenizer, "e\U000119E0\u0301")), "e\U000119E0\u0301");
}

TEST(Tokenizer, TakesLinearTimeOnRunsOfOneCharacter) {
  Json json = small_tokenizer();
  json["normalizer"] = {{"type", "NFC"}};
  const Tokenizer tokenizer = make(json);
  std::string accents;
  for (int i = 0; i < 200'000; ++i) accents += i % 2 == 0 ? "\u0301" : "\u0316";
  const auto begin = std::chrono::steady_clock::now();
  for (const std::string& text : {std::string(10'000'000, ' ') + "x", std::string(2'000'000, 'l'), accents}) {
    EXPECT_FALSE(encode(tokenizer, text).empty());
  }
  // A quadratic step would take hours, so the limit can be wide enough for any machine and sanitizer.
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::minutes(2));
}

TEST(Tokenizer, RefusesOtherKinds) {
  const auto refused = [](const char* pointer, const Json& value, std::string_view message) {
    Json json = small_tokenizer();
    json[Json::json_pointer(pointer)] = value;
    expect_refused(json, StatusCode::kUnsupported, message);
  };
  refused("/model/type", "WordPiece", "model of type \"WordPiece\"; allowed: BPE");
  refused("/model/type", "Unigram", "\"Unigram\"");
  refused("/model/dropout", 0.1, "model.dropout is 0.1");
  refused("/model/continuing_subword_prefix", "##", "model.continuing_subword_prefix");
  refused("/model/end_of_word_suffix", "</w>", "model.end_of_word_suffix");
  refused("/normalizer", {{"type", "Prepend"}}, "normalizer of type \"Prepend\"");
  refused("/pre_tokenizer", {{"type", "Metaspace"}}, "pre_tokenizer of type \"Metaspace\"");
  refused("/pre_tokenizer", nullptr, "pre_tokenizer");
  refused("/pre_tokenizer/pretokenizers/0/behavior", "Removed", "\"Removed\"; allowed: Isolated");
  refused("/pre_tokenizer/pretokenizers/0/invert", true, "invert");
  refused("/pre_tokenizer/pretokenizers/0/pattern", {{"String", " "}}, "Regex");
  refused("/pre_tokenizer/pretokenizers/0/pattern/Regex", R"(\w+)", "escape \\w");
  refused("/post_processor", {{"type", "BertProcessing"}}, "\"BertProcessing\"");
  refused("/decoder", {{"type", "WordPiece"}}, "decoder of type \"WordPiece\"");
  refused("/added_tokens/0/lstrip", true, "lstrip");
  refused("/added_tokens/0/single_word", true, "single_word");
}

TEST(Tokenizer, RefusesMalformedFiles) {
  const auto refused = [](const char* pointer, const Json& value, std::string_view message) {
    Json json = small_tokenizer();
    json[Json::json_pointer(pointer)] = value;
    expect_refused(json, StatusCode::kIoError, message);
  };
  refused("/model", nullptr, "key \"model\": expected an object, found nothing");
  refused("/model/vocab", 3, "model.vocab");
  refused("/model/vocab/he", 257, "share id 257");
  refused("/model/vocab/he", 2147483648, "id 2147483648; allowed: 0 to");
  refused("/model/vocab/he", 18446744073709551615ULL, "allowed: 0 to");
  refused("/model/vocab/he", -1, "id -1");
  refused("/model/vocab/he", 1.5, "model.vocab");
  refused("/model/merges", "x", "model.merges");
  refused("/model/merges/0", "x", "model.merges");
  refused("/model/merges/0", "h e l", "model.merges");
  refused("/model/merges/0", "h zz", "merge 0 names \"zz\"");
  refused("/model/merges/0", "h l", "merge 0 names \"hl\"");
  refused("/model/merges/0", {"h"}, "model.merges");
  refused("/model/ignore_merges", 1, "ignore_merges");
  refused("/added_tokens", 1, "added_tokens");
  refused("/added_tokens/0/content", "", "0 bytes");
  refused("/added_tokens/0/id", 7, "the vocabulary says otherwise");
  refused("/added_tokens/0/id", kEot, "repeats");
  refused("/added_tokens/0/id", 4294967296, "id 4294967296");
  refused("/added_tokens/0/special", nullptr, "added_tokens.special");
  refused("/post_processor/special_tokens", Json::object(), "special_tokens.<|begin_of_text|>");
  refused("/post_processor/special_tokens/<|begin_of_text|>/ids/0", 264, "allowed: 0 to 263");
  refused("/pre_tokenizer/pretokenizers/0/pattern/Regex", "(a", "'(' without ')'");
}

TEST(Tokenizer, RefusesAVocabularyThatLacksAByte) {
  Json json = small_tokenizer();
  json["model"]["vocab"].erase("\u0100");
  expect_refused(json, StatusCode::kUnsupported, "byte 0x00");
}

TEST(Tokenizer, SurvivesDeepNesting) {
  const std::string deep = std::string(200'000, '[') + std::string(200'000, ']');
  EXPECT_EQ(Tokenizer::parse(deep, "x").status().code(), StatusCode::kIoError);
  const std::string inside = R"({"model": {"type": "BPE", "dropout": )" + deep + "}}";
  EXPECT_EQ(Tokenizer::parse(inside, "x").status().code(), StatusCode::kUnsupported);
  Json sequence = {{"type", "NFC"}};
  for (int i = 0; i < 20; ++i) sequence = {{"type", "Sequence"}, {"normalizers", {sequence}}};
  Json json = small_tokenizer();
  json["normalizer"] = sequence;
  expect_refused(json, StatusCode::kUnsupported, "nested deeper than");
}

TEST(Tokenizer, ReportsARuleThatBacktracksWithoutEnd) {
  Json json = small_tokenizer();
  json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(?:h|hh)+[^h]";
  const Result<Ids> ids = make(json).encode(std::string(200, 'h'), false);
  ASSERT_FALSE(ids.ok());
  EXPECT_EQ(ids.status().code(), StatusCode::kUnsupported);
  EXPECT_NE(ids.status().message().find("gave up"), std::string::npos) << ids.status().message();
}

TEST(Tokenizer, LoadsFromAFile) {
  const compact::testing::TempDir dir;
  const auto path = dir.write("tokenizer.json", small_tokenizer().dump());
  EXPECT_TRUE(Tokenizer::load(path).ok());
  const Status status = Tokenizer::load(dir.path() / "none.json").status();
  EXPECT_EQ(status.code(), StatusCode::kIoError);
  EXPECT_NE(status.message().find("none.json"), std::string::npos);
}

TEST(Tokenizer, HasTheTokensOfAChatFormatOrSaysWhichIsMissing) {
  const Tokenizer tokenizer = make(small_tokenizer());
  EXPECT_TRUE(check_chat_format(ChatFormat::kNone, tokenizer).ok());
  const Status status = check_chat_format(ChatFormat::kChatMl, tokenizer);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("<|im_start|>"), std::string::npos) << status.message();
}

TEST(RegexDialect, RefusesWhatTheEnginesReadDifferently) {
  for (const char* pattern : {R"(\w)",   R"(\b)",   R"(\h)",       R"(\K)",     R"(\x41)", R"(\p{Han})", R"(\1)",
                              "^a",      "a$",      "[a[b]]",      "[a&&b]",    "(?<n>a)", "(?i)a",      "(?<=a)b",
                              "a{2}+",   "a{2}?",   "a**",         "a{1,2}{3}", "*a",      "(?=a)*",     "a{,3}",
                              "(?i:ss)", "(?i:fi)", "(?i:\u00e9)", "(?i:[a])",  "(?i:.)",  R"([\P{L}])", "a{1,2000}"}) {
    const Result<std::string> translated = translate_regex(pattern);
    EXPECT_EQ(translated.status().code(), StatusCode::kUnsupported) << pattern;
  }
  for (const char* pattern : {"(a", "a)", "[a", "[]", "a\\", R"(\p)", R"(\p{L)", R"(\x{})", R"(\x{110000})",
                              R"(\ud800)", R"(\u12)", "[b-a]", "a{3,1}", "\xFF"}) {
    EXPECT_EQ(translate_regex(pattern).status().code(), StatusCode::kIoError) << pattern;
  }
}

}  // namespace
}  // namespace compact::engine
