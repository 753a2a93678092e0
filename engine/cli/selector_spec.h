/// `--selector dense,mean-key,mean-key:share=0.1`: several selectors side by side, each with flags of its own.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "compact/status.h"
#include "engine/cli/generate_flags.h"

namespace compact::engine {

/// A selector name, then any number of `:flag=value`, flags as on the command line without their dashes. What it does
/// not set comes from `base`.
/// Errors: kInvalidArgument for an empty name, an unknown flag, a value that does not fit, or a flag that must be the
/// same for all (--chat, --threads).
[[nodiscard]] Result<GenerateFlags> parse_selector_spec(const GenerateFlags& base, std::string_view spec);

/// The parts of a comma-separated list, empty ones left out.
[[nodiscard]] std::vector<std::string> split_list(std::string_view text, char separator = ',');

/// Specs from a comma-separated list. A part that cannot begin a spec goes on with the one before it: the commas of a
/// budget do not end its selector.
[[nodiscard]] std::vector<std::string> split_selectors(std::string_view text);

/// Every prefill flag with its value as text, --threads and --selector aside: what makes runs comparable.
[[nodiscard]] nlohmann::json prefill_flag_values(GenerateFlags flags);

}  // namespace compact::engine
