/// Strict JSON for small configuration files. Included by .cc files only, so that the JSON library stays private.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "compact/status.h"

namespace compact::engine {

/// Parses a whole file into an object. Stricter than the JSON grammar where leniency hides mistakes: a key twice in
/// one object, nesting deeper than 64, more than 64 MiB and a top level that is no object are refused.
/// Errors: kIoError naming `file_name` and, for a syntax error, line and column.
[[nodiscard]] Result<nlohmann::json> parse_json_object(std::string_view text, std::string_view file_name);

/// Untrusted text for a message: quoted, ASCII escapes, cut after 64 bytes.
[[nodiscard]] std::string quote(std::string_view text);

/// A value for a message: scalars in full up to 64 bytes, containers by kind and size.
[[nodiscard]] std::string shown(const nlohmann::json& value);

}  // namespace compact::engine
