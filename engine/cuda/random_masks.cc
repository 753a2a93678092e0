#include "engine/cuda/random_masks.h"

#include <algorithm>

namespace compact::engine {

Result<RandomMasks> RandomMasks::create(const SelectorOptions& selector, const ForcedPages& forced,
                                        std::int32_t num_layers, std::int64_t mask_words) {
  RandomMasks masks;
  CA_ASSIGN_OR_RETURN(masks.selector_, make_selector(selector));
  masks.forced_ = forced;
  masks.num_layers_ = num_layers;
  masks.mask_words_ = mask_words;
  CA_ASSIGN_OR_RETURN(masks.words_, PinnedBuffer::create(2 * num_layers * mask_words * std::int64_t{8}));
  for (Event& sent : masks.sent_) {
    CA_ASSIGN_OR_RETURN(sent, Event::create());
  }
  return masks;
}

Status RandomMasks::begin_chunk() {
  turn_ = 1 - turn_;
  return cuda_status(cudaEventSynchronize(sent_[turn_].get()), "masks of the selector random");
}

Status RandomMasks::upload(std::int32_t layer, std::int32_t chunk_start, const CudaStepInput& step,
                           const CudaStepSizes& sizes, std::uint64_t* mask, ThreadPool& pool, cudaStream_t stream) {
  const ChunkView one_token{0, 1, chunk_start, nullptr};
  SelectInput input;
  input.chunks = std::span(&one_token, 1);
  input.q = {.tokens = 1, .heads = step.num_q_heads, .head_dim = 1};  // nobody reads it
  input.page_tokens = step.page_tokens;
  input.softmax_scale = 1;
  input.kv.num_kv_heads = step.num_kv_heads;
  input.layer = layer;
  input.forced = forced_;
  CA_RETURN_IF_ERROR(selector_->select(input, rows_, pool));
  auto* const words =
      static_cast<std::uint64_t*>(words_.data()) + (std::int64_t{turn_} * num_layers_ + layer) * mask_words_;
  std::fill_n(words, sizes.mask_words, 0);
  for (std::int32_t head = 0; head < step.num_kv_heads; ++head) {
    for (std::int32_t block = 0; block < sizes.max_blocks; ++block) {
      std::copy_n(rows_.row(head, 0), rows_.words_per_row,
                  words + (std::int64_t{head} * sizes.max_blocks + block) * sizes.words_per_row);
    }
  }
  CA_RETURN_IF_ERROR(cuda_status(
      cudaMemcpyAsync(mask, words, static_cast<std::size_t>(sizes.mask_words) * 8, cudaMemcpyHostToDevice, stream),
      "masks of the selector random"));
  return cuda_status(cudaEventRecord(sent_[turn_].get(), stream), "masks of the selector random");
}

}  // namespace compact::engine
