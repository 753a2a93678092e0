/// A model where it is computed, and requests that run on it: all that sessions, commands and measurements use.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "compact/page_tables.h"
#include "compact/status.h"
#include "compact/thread_pool.h"
#include "engine/loader/model_config.h"
#include "engine/model/backend.h"
#include "engine/model/chunk_attention.h"

namespace compact::engine {

enum class LogitsOf : std::int32_t { kNone, kLastToken, kAllTokens };

struct BatchOptions {
  std::int32_t max_step_tokens = 1024;  // of one forward, over all its requests
  std::int32_t max_requests = 1;        // live at a time
  std::int32_t page_tokens = 128;       // P
  std::int32_t num_pages = 0;           // of the cache, shared by all requests
  std::int32_t max_request_pages = 0;   // longest page table; 0: num_pages
  DType kv_dtype = DType::kF32;
  SparsityOptions sparsity;  // prefill; what is asked to be dense reads every page
  SummaryFields extra;       // records of the cache that an observer reads, besides those of the selector

  [[nodiscard]] std::int32_t request_pages() const noexcept {
    return max_request_pages > 0 ? max_request_pages : num_pages;
  }
};

/// The records that either needs.
[[nodiscard]] SummaryFields either(const SummaryFields& a, const SummaryFields& b);

/// What a request does in a step.
struct BatchPart {
  RequestId request = 0;
  std::span<const std::int32_t> tokens;  // [C] continue the request; at least one
  /// Every page is read (decode steps, a dense final chunk), and the chunk counted as kRequested.
  bool dense = false;
  LogitsOf logits = LogitsOf::kNone;
};

/// Requests that come and go on one paged cache. A step computes the next chunk of some of them: of any lengths and
/// places, prefill and decode side by side.
class Batch {
 public:
  virtual ~Batch() = default;

  /// Page tables, lengths and free pages of the cache.
  [[nodiscard]] virtual const PageTables& tables() const noexcept = 0;

  /// A request whose first tokens are those of `prefix_pages`: complete pages of the cache, in logical order, of the
  /// same tokens in the same chunks. Errors: kInvalidArgument (max_requests are live, more than max_request_pages, a
  /// page that nobody holds or that is not complete), kUnsupported (a prefix where layers are copied to the host),
  /// kOutOfMemory.
  [[nodiscard]] virtual Result<RequestId> add_request(std::span<const std::int32_t> prefix_pages) = 0;

  /// Forgets the request; pages that nobody else holds are free again. Errors: kInvalidArgument (unknown request).
  [[nodiscard]] virtual Status release(RequestId request) = 0;

  /// One more holder of a page that is held, and one fewer: a prefix cache keeps pages beyond their requests.
  /// Errors: kInternal (a page that nobody holds), kUnsupported (where layers are copied to the host).
  [[nodiscard]] virtual Status hold_page(std::int32_t page) = 0;
  [[nodiscard]] virtual Status drop_page(std::int32_t page) = 0;

  /// Runs the next chunk of every part through all layers. Whether a chunk's attention is dense is decided for each by
  /// itself, and a chunk reads what it would read alone.
  /// logits: [rows asked for by the parts, in their order, vocab_size]; without any the call may return before the
  /// work is done. Errors: those of check_step, and nothing changed; kCudaError, kInternal, an observer's: the requests
  /// of the step hold an unknown part of it and can only be released.
  [[nodiscard]] virtual Status forward(std::span<const BatchPart> parts, ThreadPool& pool,
                                       std::vector<float>& logits) = 0;

  /// What every layer did for all requests since the last call, once all of it is done.
  [[nodiscard]] virtual Result<std::vector<LayerReport>> take_reports() = 0;

  /// Called by every layer from now on, for measurements. Errors: kUnsupported where keys do not lie on the host.
  [[nodiscard]] virtual Status observe(AttentionObserver observer) = 0;

  /// Bytes of K and V, and of page summaries, over all layers.
  [[nodiscard]] virtual std::int64_t kv_bytes() const noexcept = 0;
  [[nodiscard]] virtual std::int64_t summary_bytes() const noexcept = 0;
};

class Model {
 public:
  virtual ~Model() = default;
  [[nodiscard]] virtual const ModelConfig& config() const noexcept = 0;
  [[nodiscard]] virtual std::int64_t weight_bytes() const noexcept = 0;
  [[nodiscard]] virtual Backend backend() const noexcept = 0;
  /// What computes, for reports: a GPU's name, or the instruction set of the CPU kernels.
  [[nodiscard]] virtual std::string processor() const = 0;
  /// A batch without requests. The model must outlive it. Errors: kInvalidArgument, kUnsupported (options),
  /// kOutOfMemory.
  [[nodiscard]] virtual Result<std::unique_ptr<Batch>> start(const BatchOptions& options) const = 0;
};

/// One request on a cache of its own.
class Sequence {
 public:
  /// Errors: those of Model::start; kInvalidArgument unless max_requests is 1.
  [[nodiscard]] static Result<Sequence> create(const Model& model, const BatchOptions& options);

  /// Runs the next chunk: see BatchPart and Batch::forward. logits: [0, 1 or C, vocab_size].
  [[nodiscard]] Status forward(std::span<const std::int32_t> tokens, bool dense, LogitsOf logits_of, ThreadPool& pool,
                               std::vector<float>& logits);

  /// Reports, observers, sizes.
  [[nodiscard]] Batch& batch() noexcept { return *batch_; }

 private:
  Sequence(std::unique_ptr<Batch> batch, RequestId request) : batch_(std::move(batch)), request_(request) {}

  std::unique_ptr<Batch> batch_;
  RequestId request_ = 0;
};

/// 1 / sqrt(D).
[[nodiscard]] float softmax_scale(const ModelConfig& config) noexcept;

/// Errors: kInvalidArgument with the option, the value seen and what is allowed.
[[nodiscard]] Status check_batch_options(const BatchOptions& options);

/// Whether another request may come, with that prefix. Errors: kInvalidArgument.
[[nodiscard]] Status check_new_request(const BatchOptions& options, const PageTables& tables,
                                       std::span<const std::int32_t> prefix_pages);

/// Whether the parts may be a step. Errors: kInvalidArgument (a token outside the vocabulary, a position the model was
/// not made for, a part without tokens, an unknown request, two parts of one request, more than max_step_tokens),
/// kOutOfMemory (a page table past max_request_pages, more pages than are free: says how many).
[[nodiscard]] Status check_step(const ModelConfig& config, const BatchOptions& options, const PageTables& tables,
                                std::span<const BatchPart> parts);

}  // namespace compact::engine
