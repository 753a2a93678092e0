/// What `compact eval recall` writes.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "engine/eval/recall.h"
#include "engine/eval/record.h"

namespace compact::engine {

/// Keys: configuration, digest, groups (group, prompts, tokens, selectors (selector, density, union_inflation, recall,
/// recall_p5, oracle_recall, .., layers (layer, density, union_inflation, heads (head, recall, ..)))).
[[nodiscard]] nlohmann::json recall_json(const EvalConfiguration& configuration,
                                         const std::vector<GroupRecall>& groups);

/// A row for each group and selector, then a table of layers.
[[nodiscard]] std::string recall_markdown(const EvalConfiguration& configuration,
                                          const std::vector<GroupRecall>& groups);

}  // namespace compact::engine
