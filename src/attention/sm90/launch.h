// Host entry of the sm_90a prefill kernel over page lists. Lowest level: the public API checks the caller's input,
// runs the prepare kernel before this and the combine kernel after it.
#pragma once

#include "compact/status.h"
#include "src/attention/cuda/prefill_params.h"
#include "src/attention/sm90/sm90_config.h"

namespace compact {

// Item tiles are in units of sm90_tile(head_dim).tokens, at most sm90_tile(head_dim).rows / heads_per_tile tokens each,
// q_rows_valid >= 1. num_workers is the number of SMs: one CTA owns all shared memory of its SM. The kernel begins with
// griddepcontrol.wait and may be launched while its predecessor still runs.
using Sm90Params = PrefillParams;

/// Asynchronous on `stream`. Errors: kInvalidArgument, kUnsupported (head dimension, dtype, no TMA driver entry point),
/// kInternal with the text of the CUDA error.
[[nodiscard]] Status sm90_launch_prefill(const Sm90Params& params);

}  // namespace compact
