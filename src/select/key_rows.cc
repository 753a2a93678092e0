#include "src/select/key_rows.h"

#include <fmt/format.h>

#include <cmath>

#include "src/core/bf16.h"

namespace compact {

KeyRows::KeyRows(const PagedKvView& kv)
    : kv_(kv), in_place_(kv.dtype == DType::kF32 && kv.token_stride == kv.head_dim) {
  rows_.resize(static_cast<std::size_t>(kv.page_tokens));
  if (!in_place_) staged_.resize(static_cast<std::size_t>(kv.page_tokens) * static_cast<std::size_t>(kv.head_dim));
}

std::span<const float* const> KeyRows::load(std::int32_t page, std::int32_t first_token, std::int32_t tokens,
                                            std::int32_t kv_head) {
  const std::int64_t dim = kv_.head_dim;
  for (std::int32_t i = 0; i < tokens; ++i) {
    const std::int64_t offset = kv_.offset(page, first_token + i, kv_head);
    if (in_place_) {
      rows_[static_cast<std::size_t>(i)] = static_cast<const float*>(kv_.k) + offset;
      continue;
    }
    float* __restrict out = staged_.data() + i * dim;
    rows_[static_cast<std::size_t>(i)] = out;
    if (kv_.dtype == DType::kF32) {
      const float* __restrict in = static_cast<const float*>(kv_.k) + offset;
      for (std::int64_t d = 0; d < dim; ++d) out[d] = in[d];
    } else {
      const Bf16* __restrict in = static_cast<const Bf16*>(kv_.k) + offset;
      for (std::int64_t d = 0; d < dim; ++d) out[d] = to_float(in[d]);
    }
  }
  return std::span(rows_).first(static_cast<std::size_t>(tokens));
}

Status check_key_input(const char* who, std::span<const ChunkView> chunks, const ConstRows& q, const PagedKvView& kv,
                       float softmax_scale) {
  if (kv.page_tokens < 1) {
    return invalid_argument(fmt::format("{}: the cache has {} tokens a page; allowed: 1 or more", who, kv.page_tokens));
  }
  if (kv.num_kv_heads < 1 || q.heads < 1 || q.heads % kv.num_kv_heads != 0) {
    return invalid_argument(fmt::format("{}: {} query heads and {} KV heads; allowed: a multiple of the KV heads", who,
                                        q.heads, kv.num_kv_heads));
  }
  if (q.head_dim < 1 || kv.head_dim != q.head_dim) {
    return invalid_argument(
        fmt::format("{}: head dimension {} in Q and {} in the K cache", who, q.head_dim, kv.head_dim));
  }
  if (!std::isfinite(softmax_scale) || softmax_scale <= 0) {
    return invalid_argument(fmt::format("{}: softmax_scale is {}; allowed: finite and above 0", who, softmax_scale));
  }
  for (std::size_t b = 0; b < chunks.size(); ++b) {
    const ChunkView& chunk = chunks[b];
    if (chunk.chunk_tokens == 0) continue;
    if (q.data == nullptr) return invalid_argument(fmt::format("{}: Q is null", who));
    if (kv.k == nullptr) {
      return invalid_argument(fmt::format("{}: no K cache; the selector declares k_cache in needs()", who));
    }
    if (chunk.page_table == nullptr) return invalid_argument(fmt::format("{}: chunk {} has no page table", who, b));
    for (std::int32_t j = 0; j < chunk.num_pages(kv.page_tokens); ++j) {
      if (chunk.page_table[j] < 0 || chunk.page_table[j] >= kv.num_pages) {
        return invalid_argument(fmt::format("{}: chunk {}: page table entry {} is {}; allowed: 0..{}", who, b, j,
                                            chunk.page_table[j], kv.num_pages - 1));
      }
    }
  }
  return {};
}

}  // namespace compact
