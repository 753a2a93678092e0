/// The demo's task: facts hidden in prose, and a question about one of them, in RULER's wording (arXiv 2404.06654).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "compact/status.h"
#include "engine/text/tokenizer.h"

namespace compact::engine {

struct HaystackPrompt {
  std::string text;  // the whole prompt
  std::string question;
  std::string expected;                     // what a right answer contains
  std::vector<std::size_t> needle_offsets;  // bytes in `text` where each fact begins; the asked one first
  std::int32_t num_needles = 0;
};

/// Cuts `prose` at a sentence so that the prompt has about `target_tokens` tokens, hides four facts with seeded keys
/// and values at sentence ends spread over it, and asks for one. Errors: kInvalidArgument if the prose is too short for
/// that.
[[nodiscard]] Result<HaystackPrompt> make_haystack_prompt(std::string_view prose, std::int32_t target_tokens,
                                                          std::uint64_t seed, const Tokenizer& tokenizer);

}  // namespace compact::engine
