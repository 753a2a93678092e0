// Random data for GPU benchmarks, made on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "compact/tensor_view.h"

namespace compact::bench {

// Fills `elements` 16-bit values with roughly normal numbers; the same seed gives the same data.
cudaError_t fill_normal(void* data, std::int64_t elements, DType dtype, std::uint64_t seed);

// Paged keys [pages, Hkv, P, D] bf16, normal around the page's topic (one normal vector per page and head).
cudaError_t fill_topic_keys(void* k, std::int32_t pages, std::int32_t kv_heads, std::int32_t page_tokens,
                            std::int32_t head_dim, std::uint64_t seed);

// Queries [B * C, Hq, D] bf16: normal, plus the topics of three pages, drawn for each row from a pool of `pool_pages`
// past pages per (request, KV head). page_tables: [B, pages_per_table] on the device, physical page of each logical
// one.
struct TopicQueries {
  void* q = nullptr;
  const std::int32_t* page_tables = nullptr;
  std::int32_t requests = 0;
  std::int32_t chunk_tokens = 0;
  std::int32_t q_heads = 0;
  std::int32_t kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t pages_per_table = 0;
  std::int32_t past_pages = 0;
  std::int32_t pool_pages = 0;
};
cudaError_t fill_topic_queries(const TopicQueries& args, std::uint64_t seed);

}  // namespace compact::bench
