/// A mixture of experts on the CPU: each token runs through the few MLPs that a router scores highest for it.
#pragma once

#include <cstdint>
#include <vector>

#include "compact/thread_pool.h"
#include "engine/loader/model_config.h"
#include "engine/model/linear.h"

namespace compact::engine {

/// Which experts the tokens of a chunk run through, and what their outputs count.
struct ExpertRoutes {
  std::vector<std::int32_t> experts;  // [rows, K]  best first; of equals the lower one first
  std::vector<float> weights;         // [rows, K]  softmax over all experts, of these divided by their sum if asked for
};
/// logits: [rows, E].
[[nodiscard]] ExpertRoutes route_to_experts(const float* logits, std::int32_t rows, const ExpertConfig& config,
                                            ThreadPool& pool);

class ExpertMlp {
 public:
  struct Expert {
    Linear gate, up;  // [intermediate, hidden]
    Linear down;      // [hidden, intermediate]
  };

  ExpertMlp() = default;
  /// router: [E, hidden].
  ExpertMlp(const ExpertConfig& config, const Linear& router, std::vector<Expert> experts)
      : config_(config), router_(router), experts_(std::move(experts)) {}

  /// residual[t, :] += the weighted outputs of x[t, :]'s experts, added in the order of the routes.
  /// x, residual: [rows, hidden]. Same bits for any number of threads.
  void add(const float* x, std::int32_t rows, float* residual, ThreadPool& pool) const;

 private:
  ExpertConfig config_;
  Linear router_;
  std::vector<Expert> experts_;  // [E]
};

}  // namespace compact::engine
