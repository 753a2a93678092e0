/// A model where it is computed, and a request that runs on it: all that sessions, commands and measurements use.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "compact/status.h"
#include "compact/thread_pool.h"
#include "engine/loader/model_config.h"
#include "engine/model/backend.h"
#include "engine/model/chunk_attention.h"

namespace compact::engine {

enum class LogitsOf : std::int32_t { kNone, kLastToken, kAllTokens };

struct SequenceOptions {
  std::int32_t max_chunk_tokens = 1024;  // longest forward, of each request
  std::int32_t page_tokens = 128;        // P
  std::int32_t num_pages = 0;            // of each request's own cache
  DType kv_dtype = DType::kF32;
  SparsityOptions sparsity;  // prefill; what is asked to be dense reads every page
  SummaryFields extra;       // records of the cache that an observer reads, besides those of the selector
};

/// The records that either needs.
[[nodiscard]] SummaryFields either(const SummaryFields& a, const SummaryFields& b);

/// One request on a cache of its own.
class Sequence {
 public:
  virtual ~Sequence() = default;

  /// Runs the next chunk through every layer. `tokens` continue the request; `dense` reads every page (decode steps, a
  /// dense final chunk) and is counted as kRequested. logits: [1 or C, vocab_size] as asked for; empty for kNone, which
  /// may return before the work is done.
  /// Errors: those of check_chunk and of the cache (kOutOfMemory says how many pages are needed); kCudaError.
  [[nodiscard]] virtual Status forward(std::span<const std::int32_t> tokens, bool dense, LogitsOf logits_of,
                                       ThreadPool& pool, std::vector<float>& logits) = 0;

  /// What every layer did since the last call, once all of it is done.
  [[nodiscard]] virtual Result<std::vector<LayerReport>> take_reports() = 0;

  /// Called by every layer from now on, for measurements. Errors: kUnsupported where keys do not lie on the host.
  [[nodiscard]] virtual Status observe(AttentionObserver observer) = 0;

  /// Bytes of K and V, and of page summaries, over all layers.
  [[nodiscard]] virtual std::int64_t kv_bytes() const noexcept = 0;
  [[nodiscard]] virtual std::int64_t summary_bytes() const noexcept = 0;
};

/// Requests that advance together, each on a cache of its own: a step computes a chunk of every one.
class Batch {
 public:
  virtual ~Batch() = default;

  /// Runs the next chunk of every request: tokens[b] continue request b, none let it rest. Lengths and places may
  /// differ; each chunk is dense or not for reasons of its own, unless all are asked to be `dense`.
  /// logits: [requests that were given tokens, vocab_size] for kLastToken, [all tokens, vocab_size] for kAllTokens, in
  /// the order of the requests. Errors: those of Sequence::forward, for any of them; nothing ran then.
  [[nodiscard]] virtual Status forward(std::span<const std::span<const std::int32_t>> tokens, bool dense,
                                       LogitsOf logits_of, ThreadPool& pool, std::vector<float>& logits) = 0;

  /// What every layer did for all requests since the last call, once all of it is done.
  [[nodiscard]] virtual Result<std::vector<LayerReport>> take_reports() = 0;
};

class Model {
 public:
  virtual ~Model() = default;
  [[nodiscard]] virtual const ModelConfig& config() const noexcept = 0;
  [[nodiscard]] virtual std::int64_t weight_bytes() const noexcept = 0;
  [[nodiscard]] virtual Backend backend() const noexcept = 0;
  /// What computes, for reports: a GPU's name, or the instruction set of the CPU kernels.
  [[nodiscard]] virtual std::string processor() const = 0;
  /// A request without tokens. The model must outlive it. Errors: kInvalidArgument, kUnsupported (options),
  /// kOutOfMemory.
  [[nodiscard]] virtual Result<std::unique_ptr<Sequence>> start(const SequenceOptions& options) const = 0;
  /// The same for several requests. Errors: also kUnsupported on the CPU, with a selector that runs there, and for
  /// traced pages.
  [[nodiscard]] virtual Result<std::unique_ptr<Batch>> start_batch(std::int32_t num_requests,
                                                                   const SequenceOptions& options) const = 0;
};

/// 1 / sqrt(D).
[[nodiscard]] float softmax_scale(const ModelConfig& config) noexcept;

/// Whether `tokens` may stand at positions [start, start + size). Errors: kInvalidArgument (a token outside the
/// vocabulary, a position the model was not made for).
[[nodiscard]] Status check_chunk(const ModelConfig& config, std::span<const std::int32_t> tokens, std::int64_t start);

}  // namespace compact::engine
