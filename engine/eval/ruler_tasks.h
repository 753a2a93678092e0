/// The families of RULER's tasks; ruler_task.h makes them by name.
#pragma once

#include <memory>
#include <string_view>

#include "compact/status.h"
#include "engine/eval/ruler_task.h"

namespace compact::engine {

/// Needles in a haystack; null for a name that is none of theirs.
[[nodiscard]] Result<std::unique_ptr<RulerTask>> make_niah_task(std::string_view name, const RulerSources& sources);
/// vt: a chain of variable assignments in noise, after a worked example of at most 500 tokens.
[[nodiscard]] Result<std::unique_ptr<RulerTask>> make_variable_tracking_task(const CountTokens& count_tokens);

/// cwe: the ten words that stand most often in a numbered list, after a worked example.
[[nodiscard]] Result<std::unique_ptr<RulerTask>> make_common_words_task(std::int32_t length_tokens,
                                                                        const RulerSources& sources);
/// fwe: the three most frequent words of a coded text with Zipf's frequencies.
[[nodiscard]] Result<std::unique_ptr<RulerTask>> make_frequent_words_task(std::int32_t length_tokens);
/// qa_1, qa_2: a question of the user's file about one or a few of many documents.
[[nodiscard]] Result<std::unique_ptr<RulerTask>> make_question_task(std::string_view name, const RulerSources& sources);

/// "task cwe needs words": the user gave none.
[[nodiscard]] Status missing_source(std::string_view task, std::string_view source, std::string_view flag);

/// RULER's noise, one line of it.
inline constexpr std::string_view kNoiseLine =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
/// Haystacks that grow without bound stop here: 2^31 tokens are never reached.
inline constexpr std::int64_t kMaxHaystackUnits = std::int64_t{1} << 28;

}  // namespace compact::engine
