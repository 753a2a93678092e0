/// One request from its prompt on: what an answer is generated on, and what measurements look into.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "compact/status.h"
#include "compact/thread_pool.h"
#include "engine/model/chunk_attention.h"
#include "engine/model/model.h"

namespace compact::engine {

struct SessionOptions {
  Backend backend = Backend::kCpu;   // for whoever loads the model
  std::int32_t chunk_tokens = 1024;  // C of all chunks but the last
  std::int32_t page_tokens = 128;    // P
  std::int32_t kv_pages = 0;         // pages of the cache; 0: as many as this request can need
  DType kv_dtype = DType::kF32;
  SparsityOptions sparsity;        // prefill; decode steps read every page
  bool final_chunk_dense = false;  // the prompt's last chunk reads every page
};

/// What a model is started with for a request of that length.
/// Errors, all before any work: kInvalidArgument (an empty prompt, a chunk of 0 tokens, more prompt tokens than the
/// model has positions), kOutOfMemory (a cache too small for the prompt: says how many pages it takes).
[[nodiscard]] Result<BatchOptions> batch_options(const ModelConfig& config, std::int64_t prompt_tokens,
                                                 std::int64_t decode_tokens, const SessionOptions& options,
                                                 SummaryFields extra = {});

class Session {
 public:
  /// After a chunk: the prompt's tokens done, and logits of its rows as asked for.
  using OnChunk = std::function<Status(std::int32_t done, std::span<const float> logits)>;

  /// decode_tokens: how many may be fed back after the prompt. extra: records of the cache that an observer reads,
  /// besides those of the selector.
  /// Errors, all before any work: those of batch_options and Model::start.
  [[nodiscard]] static Result<Session> create(const Model& model, std::int64_t prompt_tokens,
                                              std::int64_t decode_tokens, const SessionOptions& options,
                                              SummaryFields extra = {});

  /// Runs the whole prompt, chunk by chunk. kLastToken asks for logits of the prompt's last token only.
  [[nodiscard]] Status prefill(std::span<const std::int32_t> prompt, LogitsOf logits_of, const OnChunk& on_chunk,
                               ThreadPool& pool);
  /// Feeds one token back; logits: [vocab_size].
  [[nodiscard]] Status decode(std::int32_t token, ThreadPool& pool);

  /// Of the last token that ran.
  [[nodiscard]] std::span<const float> logits() const noexcept { return logits_; }
  /// Whether another token can be fed back.
  [[nodiscard]] bool has_room() const noexcept { return length_ < max_positions_; }
  /// Where the request is computed: reports, observers, sizes.
  [[nodiscard]] Batch& batch() noexcept { return sequence_.batch(); }

 private:
  explicit Session(Sequence sequence) : sequence_(std::move(sequence)) {}

  Sequence sequence_;
  std::int32_t chunk_tokens_ = 0;
  bool final_chunk_dense_ = false;
  std::int64_t max_positions_ = 0;  // of the model and of the cache
  std::int64_t length_ = 0;
  std::vector<float> logits_;
};

}  // namespace compact::engine
