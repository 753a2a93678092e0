#include "engine/scheduler/generate.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "engine/model/stopwatch.h"

namespace compact::engine {

Result<GenerateResult> generate(const Model& model, std::span<const std::int32_t> prompt,
                                const GenerateOptions& options, const GenerateCallbacks& callbacks, ThreadPool& pool) {
  if (options.max_tokens < 1) {
    return invalid_argument(fmt::format("max-tokens is {}\n  allowed: 1 or more", options.max_tokens));
  }
  CA_ASSIGN_OR_RETURN(Sampler sampler, Sampler::create(options.sampling));
  // The last sampled token is never fed back, so it needs no room.
  CA_ASSIGN_OR_RETURN(Session session, Session::create(model, std::ssize(prompt), options.max_tokens - 1, options));

  GenerateResult result;
  result.backend = model.backend();
  result.processor = model.processor();
  result.prompt_tokens = static_cast<std::int32_t>(prompt.size());
  result.kv_bytes = session.batch().kv_bytes();
  result.summary_bytes = session.batch().summary_bytes();

  const Stopwatch prefill_stopwatch;
  const auto on_chunk = [&](std::int32_t done, std::span<const float>) -> Status {
    ++result.prefill_chunks;
    if (callbacks.on_prefill) callbacks.on_prefill(done, result.prompt_tokens);
    return {};
  };
  CA_RETURN_IF_ERROR(session.prefill(prompt, LogitsOf::kLastToken, on_chunk, pool));
  std::int32_t token = sampler.sample(session.logits());
  result.prefill_seconds = prefill_stopwatch.seconds();
  CA_ASSIGN_OR_RETURN(result.layers, session.batch().take_reports());

  const Stopwatch decode_stopwatch;
  while (true) {
    if (std::find(options.end_tokens.begin(), options.end_tokens.end(), token) != options.end_tokens.end()) {
      result.stopped_by_end_token = true;
      break;
    }
    result.tokens.push_back(token);
    if (callbacks.on_token) callbacks.on_token(token);
    if (callbacks.stop && callbacks.stop()) break;
    if (std::ssize(result.tokens) >= options.max_tokens || !session.has_room()) break;
    CA_RETURN_IF_ERROR(session.decode(token, pool));
    token = sampler.sample(session.logits());
  }
  result.decode_seconds = decode_stopwatch.seconds();
  return result;
}

}  // namespace compact::engine
