/// From the regular expressions of tokenizer.json to PCRE2's.
///
/// The files are written for the `tokenizers` package, whose engine is Oniguruma with Ruby syntax. The two languages
/// look the same and differ in places that change token ids: the Unicode version behind \p{L}, U+180E in \s, \v, \xHH,
/// [a[b]], `{n}+`, \w, multi-character case folding. So a pattern is not handed over: it is read by a small parser that
/// knows the part of the language where both engines can be made to agree, and written anew; the rest is refused by
/// name.
#pragma once

#include <string>
#include <string_view>

#include "compact/status.h"

namespace compact::engine {

/// Writes `pattern` (Oniguruma, Ruby syntax) for PCRE2 with UTF and UCP.
///
/// Known: literals; \r \n \t \f \v \x{H} \uHHHH; \s \S \d \D; \p and \P of L Lu Ll Lt Lm Lo M N Nd P S; classes of
/// those; `.`;
/// (?:..) (?i:..) (?=..) (?!..) (?>..) and plain groups; | * + ? {n} {n,} {n,m}, lazy and possessive.
/// Under (?i:..) only ASCII literals, and none that folds together with its neighbour ("ss", "st", "ff", "fi", "fl").
/// Errors: kUnsupported for a construct outside that list, kIoError for a pattern that is malformed.
[[nodiscard]] Result<std::string> translate_regex(std::string_view pattern);

}  // namespace compact::engine
