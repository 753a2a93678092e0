#include "engine/model/experts.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>

#include "engine/model/layers.h"

namespace compact::engine {
namespace {

// The K experts of one token. logits: [E].
void route_token(const float* logits, const ExpertConfig& config, std::int32_t* chosen, float* weights) {
  const std::int32_t num_experts = config.num_experts;
  const float top = *std::max_element(logits, logits + num_experts);
  float all = 0;
  for (std::int32_t expert = 0; expert < num_experts; ++expert) all += std::exp(logits[expert] - top);
  float of_chosen = 0;
  for (std::int32_t j = 0; j < config.experts_per_token; ++j) {
    std::int32_t best = -1;
    for (std::int32_t expert = 0; expert < num_experts; ++expert) {
      if (std::find(chosen, chosen + j, expert) != chosen + j) continue;
      if (best < 0 || logits[expert] > logits[best]) best = expert;
    }
    chosen[j] = best;
    weights[j] = std::exp(logits[best] - top) / all;
    of_chosen += weights[j];
  }
  if (!config.normalize_weights) return;
  for (std::int32_t j = 0; j < config.experts_per_token; ++j) weights[j] /= of_chosen;
}

}  // namespace

ExpertRoutes route_to_experts(const float* logits, std::int32_t rows, const ExpertConfig& config, ThreadPool& pool) {
  const std::int64_t per_token = config.experts_per_token;
  ExpertRoutes routes;
  routes.experts.resize(static_cast<std::size_t>(rows * per_token));
  routes.weights.resize(routes.experts.size());
  pool.parallel_for(rows, [&](std::int64_t row, std::int32_t) {
    route_token(logits + row * config.num_experts, config, routes.experts.data() + row * per_token,
                routes.weights.data() + row * per_token);
  });
  return routes;
}

// Tokens are gathered expert by expert, so that an expert's weights are widened once and multiplied with all of its
// tokens at a time.
void ExpertMlp::add(const float* x, std::int32_t rows, float* residual, ThreadPool& pool) const {
  const std::int64_t hidden = router_.in_features();
  const std::int64_t per_token = config_.experts_per_token;
  const auto num_experts = static_cast<std::size_t>(config_.num_experts);
  const std::int64_t num_slots = rows * per_token;  // a slot is one token at one of its experts
  std::vector<float> logits(static_cast<std::size_t>(rows) * num_experts);
  router_.apply(x, rows, logits.data(), false, pool);
  const ExpertRoutes routes = route_to_experts(logits.data(), rows, config_, pool);

  std::vector<std::int64_t> begins(num_experts + 1, 0);  // slots of expert e: [begins[e], begins[e + 1])
  for (const std::int32_t expert : routes.experts) ++begins[static_cast<std::size_t>(expert) + 1];
  std::partial_sum(begins.begin(), begins.end(), begins.begin());
  std::vector<std::int64_t> next(begins.begin(), begins.end() - 1);
  std::vector<std::int64_t> slot_of(static_cast<std::size_t>(num_slots));   // [rows, K]
  std::vector<std::int64_t> token_of(static_cast<std::size_t>(num_slots));  // [slots]
  for (std::int64_t i = 0; i < num_slots; ++i) {
    const std::int64_t slot = next[static_cast<std::size_t>(routes.experts[static_cast<std::size_t>(i)])]++;
    slot_of[static_cast<std::size_t>(i)] = slot;
    token_of[static_cast<std::size_t>(slot)] = i / per_token;
  }

  struct Scratch {
    std::vector<float> x, gate, up;  // [slots of an expert, hidden or intermediate]
    std::vector<float> weights;      // of Linear
  };
  std::vector<Scratch> scratch(static_cast<std::size_t>(pool.num_threads()));
  std::vector<float> outputs(static_cast<std::size_t>(num_slots * hidden));  // [slots, hidden]
  pool.parallel_for(config_.num_experts, [&](std::int64_t index, std::int32_t thread) {
    const auto e = static_cast<std::size_t>(index);
    const std::int64_t begin = begins[e];
    const auto count = static_cast<std::int32_t>(begins[e + 1] - begin);
    if (count == 0) return;
    const Expert& expert = experts_[e];
    Scratch& own = scratch[static_cast<std::size_t>(thread)];
    own.x.resize(static_cast<std::size_t>(count * hidden));
    own.gate.resize(static_cast<std::size_t>(count) * static_cast<std::size_t>(config_.intermediate_size));
    own.up.resize(own.gate.size());
    for (std::int64_t i = 0; i < count; ++i) {
      std::copy_n(x + token_of[static_cast<std::size_t>(begin + i)] * hidden, hidden, own.x.data() + i * hidden);
    }
    expert.gate.apply_alone(own.x.data(), count, own.gate.data(), false, own.weights);
    expert.up.apply_alone(own.x.data(), count, own.up.data(), false, own.weights);
    for (std::size_t i = 0; i < own.gate.size(); ++i) own.gate[i] = silu(own.gate[i]) * own.up[i];
    expert.down.apply_alone(own.gate.data(), count, outputs.data() + begin * hidden, false, own.weights);
  });
  pool.parallel_for(rows, [&](std::int64_t row, std::int32_t) {
    float* const sum = residual + row * hidden;
    for (std::int64_t j = row * per_token; j < (row + 1) * per_token; ++j) {
      const float weight = routes.weights[static_cast<std::size_t>(j)];
      const float* const output = outputs.data() + slot_of[static_cast<std::size_t>(j)] * hidden;
      for (std::int64_t i = 0; i < hidden; ++i) sum[i] += weight * output[i];
    }
  });
}

}  // namespace compact::engine
