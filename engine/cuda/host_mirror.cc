#include "engine/cuda/host_mirror.h"

#include <fmt/format.h>

#include <cstring>

#include "engine/cuda/kernels.h"
#include "engine/model/linear.h"

namespace compact::engine {
namespace {

void widen_row(const Bf16Bits* row, std::int64_t count, float* out) {
  TensorRef tensor;
  tensor.dtype = DataType::kBF16;
  tensor.bytes = {reinterpret_cast<const std::byte*>(row), static_cast<std::size_t>(count) * sizeof(Bf16Bits)};
  widen_to_f32(tensor, 0, count, out);
}

}  // namespace

Result<HostMirror> HostMirror::create(const ModelConfig& config, const BatchOptions& options, SummaryFields needs) {
  if (needs.gate_pool) {
    return unsupported(
        "the CUDA backend shows the CPU no queries and keys from before RoPE, which selector 'seer' reads there\n"
        "  try: --backend cpu");
  }
  HostMirror mirror;
  mirror.num_q_heads_ = config.num_attention_heads;
  mirror.num_kv_heads_ = config.num_key_value_heads;
  mirror.head_dim_ = config.head_dim;
  CA_ASSIGN_OR_RETURN(PagedKvCache cache, PagedKvCache::create({config.num_hidden_layers, config.num_key_value_heads,
                                                                config.head_dim, options.page_tokens, options.num_pages,
                                                                DType::kBF16, KvLayout::kHnd, needs}));
  mirror.cache_ = std::make_unique<PagedKvCache>(std::move(cache));
  mirror.request_ = mirror.cache_->add_request();
  const std::int64_t rows = options.max_step_tokens;
  const std::int64_t page_rows = rows + 2 * options.page_tokens;
  CA_ASSIGN_OR_RETURN(mirror.copied_, PinnedBuffer::create(2 * std::int64_t{config.head_dim} *
                                                           (rows * config.num_attention_heads +
                                                            2 * page_rows * config.num_key_value_heads)));
  const auto elements = [&](std::int64_t heads) { return static_cast<std::size_t>(rows * heads * config.head_dim); };
  mirror.q_.resize(elements(config.num_attention_heads));
  mirror.k_.resize(elements(config.num_key_value_heads));
  mirror.v_.resize(elements(config.num_key_value_heads));
  return mirror;
}

void HostMirror::restart() {
  [[maybe_unused]] const Status released = cache_->release(request_);  // it is there
  request_ = cache_->add_request();
}

Status HostMirror::begin_chunk(std::int32_t start, std::int32_t rows) {
  CA_ASSIGN_OR_RETURN(const std::int32_t length, cache_->length(request_));
  if (length != start) {
    return unsupported(
        fmt::format("tokens {} to {} are on the GPU alone; a selection on the CPU needs them too", length, start));
  }
  CA_RETURN_IF_ERROR(cache_->extend(request_, rows));
  CA_ASSIGN_OR_RETURN(const std::span<const std::int32_t> table, cache_->page_table(request_));
  chunk_ = {0, rows, start, table.data()};
  return {};
}

Status HostMirror::copy_layer(std::int32_t layer, const void* q, std::int64_t q_token_stride, const PagedKvView& kv,
                              const Stream& stream, ThreadPool& pool) {
  const std::int64_t dim = head_dim_;
  const std::int64_t q_row = num_q_heads_ * dim;
  const std::int32_t rows = chunk_.chunk_tokens;
  const std::int32_t first_page = chunk_.chunk_start / kv.page_tokens;
  const std::int64_t page_elements = (chunk_.num_pages(kv.page_tokens) - first_page) * kv.page_stride;
  auto* const host_q = static_cast<Bf16Bits*>(copied_.data());
  auto* const host_k = host_q + rows * q_row;
  auto* const host_v = host_k + page_elements;
  const auto bytes = [](std::int64_t elements) { return static_cast<std::size_t>(elements) * sizeof(Bf16Bits); };
  const auto copy_pages = [&](Bf16Bits* to, const void* from) {
    return cuda_status(cudaMemcpyAsync(to, static_cast<const Bf16Bits*>(from) + first_page * kv.page_stride,
                                       bytes(page_elements), cudaMemcpyDeviceToHost, stream.get()),
                       "a layer's keys and values");
  };
  CA_RETURN_IF_ERROR(
      cuda_status(cudaMemcpy2DAsync(host_q, bytes(q_row), q, bytes(q_token_stride), bytes(q_row),
                                    static_cast<std::size_t>(rows), cudaMemcpyDeviceToHost, stream.get()),
                  "a layer's queries"));
  CA_RETURN_IF_ERROR(copy_pages(host_k, kv.k));
  CA_RETURN_IF_ERROR(copy_pages(host_v, kv.v));
  CA_RETURN_IF_ERROR(stream.synchronize("a layer for the CPU"));
  pool.parallel_for(rows, [&](std::int64_t t, std::int32_t) {
    widen_row(host_q + t * q_row, q_row, q_.data() + t * q_row);
    const std::int32_t position = chunk_.chunk_start + static_cast<std::int32_t>(t);
    for (std::int32_t h = 0; h < num_kv_heads_; ++h) {
      const std::int64_t at = kv.offset(position / kv.page_tokens - first_page, position % kv.page_tokens, h);
      const std::int64_t to = (t * num_kv_heads_ + h) * dim;
      widen_row(host_k + at, dim, k_.data() + to);
      widen_row(host_v + at, dim, v_.data() + to);
    }
  });
  return cache_->write(request_, layer, chunk_.chunk_start,
                       contiguous_rows<const float>(k_.data(), rows, num_kv_heads_, head_dim_),
                       contiguous_rows<const float>(v_.data(), rows, num_kv_heads_, head_dim_), pool);
}

}  // namespace compact::engine
