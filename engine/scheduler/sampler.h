/// From logits to the next token: greedy, or seeded sampling.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "compact/status.h"

namespace compact::engine {

struct SamplingOptions {
  float temperature = 0;   // 0: greedy, the first of the largest logits
  float top_p = 1;         // keep the smallest set of tokens whose probability reaches this; in (0, 1]
  std::int32_t top_k = 0;  // keep at most this many tokens; 0: all
  std::uint64_t seed = 0;
};

class Sampler {
 public:
  /// Errors: kInvalidArgument with the option, the value seen and the range allowed.
  [[nodiscard]] static Result<Sampler> create(const SamplingOptions& options);

  /// logits: [vocab_size]. Same options, seed and logits: same tokens, on every machine.
  [[nodiscard]] std::int32_t sample(std::span<const float> logits);

 private:
  explicit Sampler(const SamplingOptions& options) : options_(options), random_(options.seed) {}

  SamplingOptions options_;
  std::mt19937_64 random_;
  std::vector<std::pair<float, std::int32_t>> candidates_;  // (probability, token), reused
};

}  // namespace compact::engine
