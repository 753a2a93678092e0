/// One request from prompt to answer: chunked prefill, then decode.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "compact/status.h"
#include "compact/thread_pool.h"
#include "engine/model/chunk_attention.h"
#include "engine/model/model.h"
#include "engine/scheduler/sampler.h"
#include "engine/scheduler/session.h"

namespace compact::engine {

struct GenerateOptions : SessionOptions {
  std::int32_t max_tokens = 128;  // tokens to generate at most
  SamplingOptions sampling;
  std::vector<std::int32_t> end_tokens;  // each ends the answer
};

struct GenerateCallbacks {
  /// After every prefill chunk: prompt tokens done, of how many.
  std::function<void(std::int32_t done, std::int32_t total)> on_prefill;
  /// After every sampled token that is not an end token.
  std::function<void(std::int32_t token)> on_token;
  /// Asked after on_token: true ends the answer there, e.g. when it holds all that was looked for.
  std::function<bool()> stop;
};

struct GenerateResult {
  Backend backend = Backend::kCpu;
  std::string processor;              // of the model
  std::vector<std::int32_t> tokens;   // sampled, without the end token
  bool stopped_by_end_token = false;  // else max_tokens or the model's positions ran out
  std::int32_t prompt_tokens = 0;
  std::int32_t prefill_chunks = 0;
  double prefill_seconds = 0;  // first chunk in to first token out
  double decode_seconds = 0;
  std::int64_t kv_bytes = 0;  // size of the cache
  std::int64_t summary_bytes = 0;
  std::vector<LayerReport> layers;  // of the prefill
};

/// Errors, all before any work: those of Session::create; kInvalidArgument (options of the sampler, no token to
/// generate).
[[nodiscard]] Result<GenerateResult> generate(const Model& model, std::span<const std::int32_t> prompt,
                                              const GenerateOptions& options, const GenerateCallbacks& callbacks,
                                              ThreadPool& pool);

}  // namespace compact::engine
