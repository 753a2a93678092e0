/// Time to first token of made-up prompts: a whole prefill by a selector, and what it was spent on.
#pragma once

#include <cstdint>
#include <string>

#include "compact/status.h"
#include "compact/thread_pool.h"
#include "engine/model/model.h"
#include "engine/scheduler/session.h"

namespace compact::engine {

struct PrefillTimes {
  double ttft_seconds = 0;  // first chunk in to the last token's logits out, of all requests
  double append_seconds = 0;
  double select_seconds = 0;
  double unite_seconds = 0;
  double attend_seconds = 0;
  UnionStats stats;
  std::int64_t peak_bytes = 0;  // of device memory; 0 on the CPU

  [[nodiscard]] double attention_seconds() const noexcept { return select_seconds + unite_seconds + attend_seconds; }
};

/// Prefills `requests` prompts of `context` random token ids each, together: every step computes a chunk of each.
/// Errors: those of batch_options, Model::start and Batch.
[[nodiscard]] Result<PrefillTimes> bench_prefill(const Model& model, std::int32_t requests, std::int32_t context,
                                                 const SessionOptions& options, ThreadPool& pool);

/// FLOP of a dense prefill of one request: two for each weight of a product and token (the output projection once),
/// four for each dimension of a visible pair of query and key.
struct PrefillFlop {
  double products = 0;
  double attention = 0;
};
[[nodiscard]] PrefillFlop dense_prefill_flop(const ModelConfig& config, std::int32_t context);

}  // namespace compact::engine
