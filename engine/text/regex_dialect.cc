#include "engine/text/regex_dialect.h"

#include <fmt/format.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>

#include "engine/text/utf8.h"

namespace compact::engine {
namespace {

constexpr int32_t kMaxDepth = 32;           // nested groups; the rules in use have 2
constexpr size_t kMaxPatternBytes = 16384;  // the longest rule in use has about 600
constexpr uint32_t kMaxRepeat = 1000;       // in {n,m}: PCRE2 expands these, so a file must not choose freely

struct Range {
  uint32_t first;
  uint32_t last;
};

// Unicode White_Space. PCRE2's \s under UCP adds U+180E, which left that set in Unicode 6.3.
constexpr Range kSpace[] = {{0x09, 0x0D},     {0x20, 0x20},     {0x85, 0x85},     {0xA0, 0xA0},     {0x1680, 0x1680},
                            {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F}, {0x3000, 0x3000}};

// Characters that Unicode 16 has in a category and Unicode 14 (PCRE2 10.42, Debian 12) has not; Unicode took none away
// and gave Lt none. The reference is at 16. With a newer PCRE2 these are harmless repetitions.
constexpr Range kLu[] = {{0x1C89, 0x1C89}, {0xA7CB, 0xA7CC}, {0xA7DA, 0xA7DA}, {0xA7DC, 0xA7DC}, {0x10D50, 0x10D65}};
constexpr Range kLl[] = {{0x1C8A, 0x1C8A}, {0xA7CD, 0xA7CD}, {0xA7DB, 0xA7DB}, {0x10D70, 0x10D85}, {0x1DF25, 0x1DF2A}};
constexpr Range kLm[] = {{0x10D4E, 0x10D4E}, {0x10D6F, 0x10D6F}, {0x16D40, 0x16D42},
                         {0x16D6B, 0x16D6C}, {0x1E030, 0x1E06D}, {0x1E4EB, 0x1E4EB}};
constexpr Range kLo[] = {
    {0x105C0, 0x105F3}, {0x10D4A, 0x10D4D}, {0x10D4F, 0x10D4F}, {0x10EC2, 0x10EC4}, {0x1123F, 0x11240},
    {0x11380, 0x11389}, {0x1138B, 0x1138B}, {0x1138E, 0x1138E}, {0x11390, 0x113B5}, {0x113B7, 0x113B7},
    {0x113D1, 0x113D1}, {0x113D3, 0x113D3}, {0x11BC0, 0x11BE0}, {0x11F02, 0x11F02}, {0x11F04, 0x11F10},
    {0x11F12, 0x11F33}, {0x1342F, 0x1342F}, {0x13441, 0x13446}, {0x13460, 0x143FA}, {0x16100, 0x1611D},
    {0x16D43, 0x16D6A}, {0x18CFF, 0x18CFF}, {0x1B132, 0x1B132}, {0x1B155, 0x1B155}, {0x1E4D0, 0x1E4EA},
    {0x1E5D0, 0x1E5ED}, {0x1E5F0, 0x1E5F0}, {0x2B739, 0x2B739}, {0x2EBF0, 0x2EE5D}, {0x31350, 0x323AF}};
constexpr Range kM[] = {{0x897, 0x897},     {0xCF3, 0xCF3},     {0xECE, 0xECE},     {0x10D69, 0x10D6D},
                        {0x10EFC, 0x10EFF}, {0x11241, 0x11241}, {0x113B8, 0x113C0}, {0x113C2, 0x113C2},
                        {0x113C5, 0x113C5}, {0x113C7, 0x113CA}, {0x113CC, 0x113D0}, {0x113D2, 0x113D2},
                        {0x113E1, 0x113E2}, {0x11F00, 0x11F01}, {0x11F03, 0x11F03}, {0x11F34, 0x11F3A},
                        {0x11F3E, 0x11F42}, {0x11F5A, 0x11F5A}, {0x13440, 0x13440}, {0x13447, 0x13455},
                        {0x1611E, 0x1612F}, {0x1E08F, 0x1E08F}, {0x1E4EC, 0x1E4EF}, {0x1E5EE, 0x1E5EF}};
constexpr Range kNd[] = {{0x10D40, 0x10D49}, {0x116D0, 0x116E3}, {0x11BF0, 0x11BF9},
                         {0x11F50, 0x11F59}, {0x16130, 0x16139}, {0x16D70, 0x16D79},
                         {0x1CCF0, 0x1CCF9}, {0x1E4F0, 0x1E4F9}, {0x1E5F1, 0x1E5FA}};
constexpr Range kNo[] = {{0x1D2C0, 0x1D2D3}};
constexpr Range kP[] = {{0x1B4E, 0x1B4F},   {0x1B7F, 0x1B7F},   {0x10D6E, 0x10D6E}, {0x113D4, 0x113D5},
                        {0x113D7, 0x113D8}, {0x11B00, 0x11B09}, {0x11BE1, 0x11BE1}, {0x11F43, 0x11F4F},
                        {0x16D6D, 0x16D6F}, {0x1E5FF, 0x1E5FF}};
constexpr Range kS[] = {
    {0x2427, 0x2429},   {0x2FFC, 0x2FFF},   {0x31E4, 0x31E5},   {0x31EF, 0x31EF},   {0x10D8E, 0x10D8F},
    {0x1CC00, 0x1CCEF}, {0x1CD00, 0x1CEB3}, {0x1F6DC, 0x1F6DC}, {0x1F774, 0x1F776}, {0x1F77B, 0x1F77F},
    {0x1F7D9, 0x1F7D9}, {0x1F8B2, 0x1F8BB}, {0x1F8C0, 0x1F8C1}, {0x1FA75, 0x1FA77}, {0x1FA87, 0x1FA89},
    {0x1FA8F, 0x1FA8F}, {0x1FAAD, 0x1FAAF}, {0x1FABB, 0x1FABF}, {0x1FAC6, 0x1FAC6}, {0x1FACE, 0x1FACF},
    {0x1FADA, 0x1FADC}, {0x1FADF, 0x1FADF}, {0x1FAE8, 0x1FAE9}, {0x1FAF7, 0x1FAF8}, {0x1FBCB, 0x1FBEF}};

struct Category {
  std::string_view name;
  std::initializer_list<std::span<const Range>> additions;
};

const Category kCategories[] = {
    {"L", {kLu, kLl, kLm, kLo}}, {"Lu", {kLu}}, {"Ll", {kLl}}, {"Lt", {}}, {"Lm", {kLm}}, {"Lo", {kLo}}, {"M", {kM}},
    {"N", {kNd, kNo}},           {"Nd", {kNd}}, {"P", {kP}},   {"S", {kS}}};

const Category* find_category(std::string_view name) {
  for (const Category& category : kCategories) {
    if (category.name == name) return &category;
  }
  return nullptr;
}

std::string code_point_item(uint32_t code_point) { return fmt::format("\\x{{{:X}}}", code_point); }

void append_ranges(std::span<const Range> ranges, std::string& out) {
  for (const Range& range : ranges) {
    out += code_point_item(range.first);
    if (range.last != range.first) out += '-' + code_point_item(range.last);
  }
}

void append_complement(std::span<const Range> ranges, std::string& out) {
  uint32_t next = 0;
  for (const Range& range : ranges) {
    if (range.first > next) append_ranges(std::array{Range{next, range.first - 1}}, out);
    next = range.last + 1;
  }
  append_ranges(std::array{Range{next, 0x10FFFF}}, out);
}

// What stands between the brackets of a class for \p{category}.
std::string category_items(const Category& category) {
  std::string items = fmt::format("\\p{{{}}}", category.name);
  for (const std::span<const Range> additions : category.additions) append_ranges(additions, items);
  return items;
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_letter(uint32_t c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

class Translator {
 public:
  explicit Translator(std::string_view pattern) : pattern_(pattern) {}

  Result<std::string> run() {
    if (pattern_.size() > kMaxPatternBytes) {
      return unsupported(fmt::format("regular expression of {} bytes; allowed: {}", pattern_.size(), kMaxPatternBytes));
    }
    if (utf8_valid_prefix_bytes(pattern_) != pattern_.size()) return malformed("invalid UTF-8");
    CA_RETURN_IF_ERROR(alternatives(/*ignore_case=*/false, /*depth=*/0));
    if (pos_ != pattern_.size()) return malformed("')' without '('");
    return std::move(out_);
  }

 private:
  enum class Atom { kNone, kRepeatable, kAssertion };

  // One escape or character: a single code point, or a set with its class items.
  struct Element {
    std::optional<uint32_t> code_point;
    std::string items;
    bool negated = false;
  };

  [[nodiscard]] Status malformed(std::string_view what) const {
    return io_error(fmt::format("regular expression `{}`: {} at byte {}", pattern_, what, pos_));
  }
  [[nodiscard]] Status refused(std::string_view what) const {
    return unsupported(
        fmt::format("regular expression `{}`: {} at byte {} (allowed: see regex_dialect.h)", pattern_, what, pos_));
  }

  [[nodiscard]] bool at_end() const { return pos_ == pattern_.size(); }
  [[nodiscard]] bool next_is(std::string_view text) const { return pattern_.substr(pos_, text.size()) == text; }
  bool take(std::string_view text) {
    if (!next_is(text)) return false;
    pos_ += text.size();
    return true;
  }

  Status alternatives(bool ignore_case, int32_t depth) {
    if (depth > kMaxDepth) return refused(fmt::format("groups nested deeper than {}", kMaxDepth));
    Atom last = Atom::kNone;
    uint32_t previous_letter = 0;  // under (?i:..): the literal just before, lower case
    while (!at_end() && !next_is(")")) {
      const char c = pattern_[pos_];
      uint32_t letter = 0;
      if (c == '|') {
        ++pos_;
        out_ += '|';
        last = Atom::kNone;
      } else if (c == '*' || c == '+' || c == '?' || c == '{') {
        if (last == Atom::kNone) return refused(fmt::format("'{}' with nothing to repeat", c));
        if (last == Atom::kAssertion) return refused("a repeated assertion");
        CA_RETURN_IF_ERROR(quantifier());
        last = Atom::kNone;
      } else if (c == '(') {
        bool is_assertion = false;
        CA_RETURN_IF_ERROR(group(ignore_case, depth, is_assertion));
        last = is_assertion ? Atom::kAssertion : Atom::kRepeatable;
      } else if (c == '^' || c == '$') {
        return refused(fmt::format("anchor '{}'", c));
      } else {
        CA_RETURN_IF_ERROR(ignore_case ? folded_literal(previous_letter, letter) : atom());
        last = Atom::kRepeatable;
      }
      previous_letter = letter;
    }
    return {};
  }

  Status group(bool ignore_case, int32_t depth, bool& is_assertion) {
    std::string_view opening = "(?:";
    if (take("(?:")) {
    } else if (take("(?i:")) {
      opening = "(?i:";
      ignore_case = true;
    } else if (take("(?=")) {
      opening = "(?=";
      is_assertion = true;
    } else if (take("(?!")) {
      opening = "(?!";
      is_assertion = true;
    } else if (take("(?>")) {
      opening = "(?>";
    } else if (next_is("(?") || next_is("(*")) {
      return refused("this kind of group");
    } else {
      ++pos_;  // a capture: nobody asks for its text
    }
    out_ += opening;
    CA_RETURN_IF_ERROR(alternatives(ignore_case, depth + 1));
    if (!take(")")) return malformed("'(' without ')'");
    out_ += ')';
    return {};
  }

  Status quantifier() {
    if (take("{")) {
      uint32_t low = 0;
      uint32_t high = 0;
      if (!number(low)) return refused("'{' that opens no {n,m}");
      out_ += fmt::format("{{{}", low);
      bool is_range = false;
      if (take(",")) {
        is_range = true;
        out_ += ',';
        if (!next_is("}")) {
          if (!number(high)) return refused("'{' that opens no {n,m}");
          if (high < low) return malformed("{n,m} with n above m");
          out_ += std::to_string(high);
        }
      }
      if (!take("}")) return refused("'{' that opens no {n,m}");
      if (low > kMaxRepeat || high > kMaxRepeat) return refused(fmt::format("a repeat count above {}", kMaxRepeat));
      out_ += '}';
      // Ruby reads {n}? and {n,m}+ as a quantifier of a quantifier.
      if (next_is("+") || (!is_range && next_is("?"))) return refused("a quantifier of a quantifier");
      if (take("?")) out_ += '?';
    } else {
      out_ += pattern_[pos_++];
      if (take("?")) {
        out_ += '?';
      } else if (take("+")) {
        out_ += '+';
      }
    }
    if (next_is("*") || next_is("+") || next_is("?") || next_is("{")) return refused("a quantifier of a quantifier");
    return {};
  }

  bool number(uint32_t& value) {
    const size_t begin = pos_;
    value = 0;
    while (!at_end() && is_digit(pattern_[pos_]) && pos_ - begin < 6) {
      value = value * 10 + static_cast<uint32_t>(pattern_[pos_++] - '0');
    }
    return pos_ > begin;
  }

  // Literals compared without case. Oniguruma also folds one character to several: (?i:ss) takes U+00DF, (?i:st) takes
  // U+FB06. PCRE2 does not, so such neighbours are refused; single letters fold alike (s and U+017F, k and U+212A).
  Status folded_literal(uint32_t previous_letter, uint32_t& letter) {
    if (next_is("[") || next_is(".")) return refused("other than ASCII literals in (?i:..)");
    Element element;
    CA_RETURN_IF_ERROR(this->element(element));
    if (!element.code_point || *element.code_point >= 0x80) return refused("other than ASCII literals in (?i:..)");
    if (is_letter(*element.code_point)) letter = *element.code_point | 0x20;
    const auto pair = [&](char a, char b) {
      return previous_letter == static_cast<uint32_t>(a) && letter == static_cast<uint32_t>(b);
    };
    if (pair('s', 's') || pair('s', 't') || pair('f', 'f') || pair('f', 'i') || pair('f', 'l')) {
      return refused("letters with a common ligature in (?i:..)");
    }
    out_ += code_point_item(*element.code_point);
    return {};
  }

  Status atom() {
    if (next_is("[")) return character_class();
    if (take(".")) {
      out_ += '.';
      return {};
    }
    Element element;
    CA_RETURN_IF_ERROR(this->element(element));
    if (element.code_point) {
      out_ += code_point_item(*element.code_point);
    } else {
      out_ += (element.negated ? "[^" : "[") + element.items + ']';
    }
    return {};
  }

  Status character_class() {
    ++pos_;
    out_ += take("^") ? "[^" : "[";
    bool is_empty = true;
    while (!next_is("]")) {
      if (at_end()) return malformed("'[' without ']'");
      if (next_is("[")) return refused("a class inside a class");
      if (next_is("&&")) return refused("an intersection of classes");
      if (next_is("-") && !is_empty && !next_is("-]")) return refused("'-' that is neither first, last nor a range");
      Element first;
      CA_RETURN_IF_ERROR(element(first));
      is_empty = false;
      if (!first.code_point) {
        // Only \S can be negated inside a class: its complement is short.
        if (first.negated && first.items != space_items()) return refused("a negated set inside a class");
        if (first.negated) {
          append_complement(kSpace, out_);
        } else {
          out_ += first.items;
        }
        continue;
      }
      out_ += code_point_item(*first.code_point);
      if (!next_is("-") || next_is("-]")) continue;
      ++pos_;
      if (at_end() || next_is("[") || next_is("&&")) return refused("a range without an end");
      Element last;
      CA_RETURN_IF_ERROR(element(last));
      if (!last.code_point) return refused("a range that ends in a set");
      if (*last.code_point < *first.code_point) return malformed("a range whose end is below its start");
      out_ += '-' + code_point_item(*last.code_point);
    }
    if (is_empty) return malformed("an empty class");
    ++pos_;
    out_ += ']';
    return {};
  }

  static std::string space_items() {
    std::string items;
    append_ranges(kSpace, items);
    return items;
  }

  Status element(Element& element) {
    if (!next_is("\\")) {
      const std::string_view rest = pattern_.substr(pos_);
      const int32_t length = utf8_sequence_bytes(rest);
      element.code_point = utf8_code_point(rest, length);
      pos_ += static_cast<size_t>(length);
      return {};
    }
    if (pos_ + 1 == pattern_.size()) return malformed("a '\\' with nothing behind it");
    const char c = pattern_[pos_ + 1];
    const auto literal = [&](uint32_t code_point) {
      element.code_point = code_point;
      pos_ += 2;
      return Status();
    };
    switch (c) {
      case 'r': return literal('\r');
      case 'n': return literal('\n');
      case 't': return literal('\t');
      case 'f': return literal('\f');
      case 'v': return literal('\v');
      case 's':
      case 'S':
        element.items = space_items();
        element.negated = c == 'S';
        pos_ += 2;
        return {};
      case 'd':
      case 'D':
        element.items = category_items(*find_category("Nd"));
        element.negated = c == 'D';
        pos_ += 2;
        return {};
      case 'p':
      case 'P': return property(element);
      case 'x':
      case 'u': return hexadecimal(element);
      default: break;
    }
    const auto byte = static_cast<uint8_t>(c);
    const bool is_punctuation = byte > 0x20 && byte < 0x7F && !is_digit(c) && !is_letter(byte) && c != '_';
    if (!is_punctuation) return refused(fmt::format("escape \\{}", byte < 0x80 && byte > 0x20 ? c : '?'));
    return literal(byte);
  }

  Status property(Element& element) {
    const bool upper = pattern_[pos_ + 1] == 'P';
    const size_t open = pos_ + 2;
    const size_t close = pattern_.find('}', open);
    if (open >= pattern_.size() || pattern_[open] != '{' || close == std::string_view::npos) {
      return malformed("\\p without {..}");
    }
    std::string_view name = pattern_.substr(open + 1, close - open - 1);
    const bool caret = name.starts_with('^');
    if (caret) name.remove_prefix(1);
    const Category* category = find_category(name);
    if (category == nullptr) return refused(fmt::format("\\p{{{}}}", name));
    element.items = category_items(*category);
    element.negated = upper != caret;
    pos_ = close + 1;
    return {};
  }

  // \x{H..} and \uHHHH.
  Status hexadecimal(Element& element) {
    const bool is_braced = pattern_[pos_ + 1] == 'x';
    size_t at = pos_ + 2;
    if (is_braced && (at >= pattern_.size() || pattern_[at++] != '{')) return refused("\\x without {..}");
    const size_t begin = at;
    const size_t max_digits = is_braced ? 6 : 4;
    uint32_t code_point = 0;
    for (; at < pattern_.size() && at - begin < max_digits; ++at) {
      const char c = pattern_[at];
      const uint32_t lower = static_cast<uint8_t>(c) | 0x20u;
      if (is_digit(c)) {
        code_point = code_point << 4 | static_cast<uint32_t>(c - '0');
      } else if (lower >= 'a' && lower <= 'f') {
        code_point = code_point << 4 | (lower - 'a' + 10);
      } else {
        break;
      }
    }
    const bool is_complete = is_braced ? at > begin && at < pattern_.size() && pattern_[at++] == '}' : at - begin == 4;
    if (!is_complete || code_point > 0x10FFFF || (code_point >= 0xD800 && code_point <= 0xDFFF)) {
      return malformed("a hexadecimal escape that is no character");
    }
    element.code_point = code_point;
    pos_ = at;
    return {};
  }

  std::string_view pattern_;
  size_t pos_ = 0;
  std::string out_;
};

}  // namespace

Result<std::string> translate_regex(std::string_view pattern) { return Translator(pattern).run(); }

}  // namespace compact::engine
