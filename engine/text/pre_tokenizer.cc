#include "engine/text/pre_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "engine/text/regex_dialect.h"
#include "engine/text/utf8.h"

namespace compact::engine {
namespace {

constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

constexpr size_t kJitStackStartBytes = 32 * 1024;
constexpr size_t kJitStackMaxBytes = 1024 * 1024;
constexpr uint32_t kInterpreterHeapKib = 256 * 1024;

// A match of a sane rule takes a few steps per byte: `\s+(?!\S)` walks back over a run of spaces once.
constexpr uint64_t kFreeSteps = 1'000'000;
constexpr uint64_t kStepsPerByte = 16;

template <auto Function>
struct Deleter {
  template <class T>
  void operator()(T* object) const noexcept {
    Function(object);
  }
};
using Code = std::unique_ptr<pcre2_code, Deleter<pcre2_code_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, Deleter<pcre2_match_data_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, Deleter<pcre2_match_context_free>>;
using CompileContext = std::unique_ptr<pcre2_compile_context, Deleter<pcre2_compile_context_free>>;
using JitStack = std::unique_ptr<pcre2_jit_stack, Deleter<pcre2_jit_stack_free>>;

std::string pcre2_message(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  if (pcre2_get_error_message(code, text.data(), text.size()) < 0) return fmt::format("PCRE2 error {}", code);
  return reinterpret_cast<const char*>(text.data());
}

Result<Code> compile(std::string_view pattern) {
  CA_ASSIGN_OR_RETURN(const std::string translated, translate_regex(pattern));
  const CompileContext context(pcre2_compile_context_create(nullptr));
  if (!context) return out_of_memory("no memory for a PCRE2 compile context");
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);  // what `.` excludes; the build's default may differ

  int error = 0;
  PCRE2_SIZE offset = 0;
  Code code(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                          PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, context.get()));
  if (!code) {
    return unsupported(fmt::format("regular expression `{}`: PCRE2 refuses it: {}", pattern, pcre2_message(error)));
  }
  // Without a JIT for this processor the interpreter matches the same, several times slower.
  (void)pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);
  return code;
}

}  // namespace

struct PreTokenizer::Regex {
  Code code;
  std::string pattern;  // as the file has it, for messages
};

struct PreTokenizer::Scratch::Matching {
  MatchData data{pcre2_match_data_create(1, nullptr)};
  MatchContext context{pcre2_match_context_create(nullptr)};
  JitStack stack{pcre2_jit_stack_create(kJitStackStartBytes, kJitStackMaxBytes, nullptr)};

  // Appends the matches of `regex` in `text`, and what lies between them, to `pieces`.
  Status split(const Regex& regex, std::string_view text, std::vector<std::string_view>& pieces);
};

PreTokenizer::Scratch::Scratch() : matching_(std::make_unique<Matching>()) {}
PreTokenizer::Scratch::~Scratch() = default;
PreTokenizer::Scratch::Scratch(Scratch&&) noexcept = default;
PreTokenizer::Scratch& PreTokenizer::Scratch::operator=(Scratch&&) noexcept = default;

PreTokenizer::PreTokenizer() = default;
PreTokenizer::PreTokenizer(PreTokenizer&&) noexcept = default;
PreTokenizer& PreTokenizer::operator=(PreTokenizer&&) noexcept = default;
PreTokenizer::~PreTokenizer() = default;

Status PreTokenizer::Scratch::Matching::split(const Regex& regex, std::string_view text,
                                              std::vector<std::string_view>& pieces) {
  const uint64_t steps =
      std::min<uint64_t>(kFreeSteps + kStepsPerByte * text.size(), std::numeric_limits<uint32_t>::max());
  pcre2_set_match_limit(context.get(), static_cast<uint32_t>(steps));
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const PCRE2_SIZE* match = pcre2_get_ovector_pointer(data.get());

  size_t piece_begin = 0;
  size_t search_from = 0;
  bool after_match = false;
  while (search_from <= text.size()) {
    // NOTE: without NO_UTF_CHECK each call would validate the rest of the text, and splitting would be quadratic.
    int rc =
        pcre2_match(regex.code.get(), subject, text.size(), search_from, PCRE2_NO_UTF_CHECK, data.get(), context.get());
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
      rc = pcre2_match(regex.code.get(), subject, text.size(), search_from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                       data.get(), context.get());
    }
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) {
      return unsupported(fmt::format("pre-tokenizer gave up at byte {} of a piece of {} bytes: {}; pattern `{}`",
                                     search_from, text.size(), pcre2_message(rc), regex.pattern));
    }
    const size_t begin = match[0];
    const size_t end = match[1];
    if (begin == end && after_match && begin == search_from) {
      // An empty match right behind a match would repeat for ever; the reference steps over one character.
      search_from += static_cast<size_t>(std::max(utf8_sequence_bytes(text.substr(search_from)), 1));
      after_match = false;
      continue;
    }
    if (begin > piece_begin) pieces.push_back(text.substr(piece_begin, begin - piece_begin));
    if (end > begin) pieces.push_back(text.substr(begin, end - begin));
    piece_begin = end;
    search_from = end;
    after_match = true;
  }
  if (piece_begin < text.size()) pieces.push_back(text.substr(piece_begin));
  return {};
}

Result<PreTokenizer> PreTokenizer::create(const PreTokenizerConfig& config) {
  PreTokenizer pre_tokenizer;
  for (const std::string& pattern : config.split_patterns) {
    CA_ASSIGN_OR_RETURN(Code code, compile(pattern));
    pre_tokenizer.steps_.push_back({std::move(code), pattern});
  }
  if (config.byte_level_regex) {
    CA_ASSIGN_OR_RETURN(Code code, compile(kGpt2Pattern));
    pre_tokenizer.steps_.push_back({std::move(code), std::string(kGpt2Pattern)});
  }
  pre_tokenizer.byte_level_regex_ = config.byte_level_regex;
  pre_tokenizer.add_prefix_space_ = config.add_prefix_space;
  return pre_tokenizer;
}

Status PreTokenizer::split(std::string_view text, Scratch& scratch, std::vector<std::string_view>& words) const {
  Scratch::Matching& matching = *scratch.matching_;
  if (!matching.data || !matching.context) return out_of_memory("no memory for PCRE2 match data");
  pcre2_set_heap_limit(matching.context.get(), kInterpreterHeapKib);
  if (matching.stack) pcre2_jit_stack_assign(matching.context.get(), nullptr, matching.stack.get());

  scratch.prefixed_.clear();
  words.clear();
  if (text.empty()) return {};
  words.push_back(text);

  const auto add_prefix_spaces = [&] {
    for (std::string_view& word : words) {
      if (word.starts_with(' ')) continue;
      word = scratch.prefixed_.emplace_back(' ' + std::string(word));
    }
  };
  const size_t num_split_steps = steps_.size() - (byte_level_regex_ ? 1 : 0);
  for (size_t step = 0; step < steps_.size(); ++step) {
    if (step == num_split_steps && add_prefix_space_) add_prefix_spaces();
    scratch.next_.clear();
    for (const std::string_view word : words) CA_RETURN_IF_ERROR(matching.split(steps_[step], word, scratch.next_));
    words.swap(scratch.next_);
  }
  if (num_split_steps == steps_.size() && add_prefix_space_) add_prefix_spaces();
  return {};
}

}  // namespace compact::engine
