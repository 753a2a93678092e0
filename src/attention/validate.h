/// Checks that every attention backend makes before it touches data.
#pragma once

#include "compact/attention.h"
#include "compact/status.h"

namespace compact {

/// kInvalidArgument with the unit, the value seen and what is allowed. After ok, every address that a backend forms
/// from the input lies inside the tensors that the views describe. Cost: one look at each list entry.
[[nodiscard]] Status validate_attention(const AttentionInput& input, const AttentionOutput& output);

}  // namespace compact
