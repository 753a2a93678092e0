#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "engine/bench/cuda/device_fill.h"

namespace compact::bench {
namespace {

__device__ std::uint64_t mix(std::uint64_t x) {
  x *= 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// Roughly normal: the sum of four uniforms.
__device__ float normal(std::uint64_t key) {
  const std::uint64_t x = mix(key);
  const auto sum = static_cast<float>((x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48));
  return (sum - 131070.0f) * (1.0f / 37837.0f);
}

// Dimension d of the topic of (physical page, KV head).
__device__ float topic(std::uint64_t seed, std::int64_t page, std::int32_t kv_heads, std::int32_t head,
                       std::int32_t head_dim, std::int32_t d) {
  return normal(seed + (std::uint64_t{1} << 36) + static_cast<std::uint64_t>((page * kv_heads + head) * head_dim + d));
}

__global__ void fill_kernel(std::uint16_t* data, std::int64_t elements, bool f16, std::uint64_t seed) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < elements;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    const float value = normal(static_cast<std::uint64_t>(i) + seed);
    data[i] = f16 ? __half_as_ushort(__float2half_rn(value)) : __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
}

__global__ void topic_keys_kernel(std::uint16_t* k, std::int64_t elements, std::int32_t kv_heads,
                                  std::int32_t page_tokens, std::int32_t head_dim, std::uint64_t seed) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < elements;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    const auto d = static_cast<std::int32_t>(i % head_dim);
    const std::int64_t page_and_head = i / head_dim / page_tokens;
    const float value = normal(static_cast<std::uint64_t>(i) + seed) +
                        topic(seed, page_and_head / kv_heads, kv_heads,
                              static_cast<std::int32_t>(page_and_head % kv_heads), head_dim, d);
    k[i] = __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
}

__device__ std::uint64_t greatest_common_divisor(std::uint64_t a, std::uint64_t b) {
  while (b != 0) {
    const std::uint64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// Page number `place` of a pool of [0, pages): no page twice, whatever the pool's size.
__device__ std::uint64_t page_of_pool(std::uint64_t pool, std::uint64_t place, std::uint64_t pages) {
  std::uint64_t factor = 1 + mix(pool) % pages;
  while (greatest_common_divisor(factor, pages) != 1) ++factor;
  return (mix(pool + 1) + place * factor) % pages;
}

// A block per (token, head), a thread per dimension.
__global__ void topic_queries_kernel(TopicQueries args, std::uint64_t seed) {
  const auto row = static_cast<std::int64_t>(blockIdx.x);
  const auto d = static_cast<std::int32_t>(threadIdx.x);
  const auto request = static_cast<std::int32_t>(row / args.q_heads / args.chunk_tokens);
  const std::int32_t kv_head = static_cast<std::int32_t>(row % args.q_heads) / (args.q_heads / args.kv_heads);
  const std::uint64_t pool =
      mix(seed + (std::uint64_t{1} << 38) + static_cast<std::uint64_t>(request * 1024 + kv_head));
  const std::int64_t element = row * args.head_dim + d;
  float value = normal(seed + (std::uint64_t{1} << 37) + static_cast<std::uint64_t>(element));
  for (std::uint64_t i = 0; i < 3 && args.pool_pages > 0; ++i) {
    const std::uint64_t place =
        mix(pool + static_cast<std::uint64_t>(row) * 3 + i) % static_cast<std::uint64_t>(args.pool_pages);
    const std::uint64_t page = page_of_pool(pool, place, static_cast<std::uint64_t>(args.past_pages));
    const std::int32_t physical =
        args.page_tables[std::int64_t{request} * args.pages_per_table + static_cast<std::int64_t>(page)];
    value += topic(seed, physical, args.kv_heads, kv_head, args.head_dim, d);
  }
  static_cast<std::uint16_t*>(args.q)[element] = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

}  // namespace

cudaError_t fill_topic_keys(void* k, std::int32_t pages, std::int32_t kv_heads, std::int32_t page_tokens,
                            std::int32_t head_dim, std::uint64_t seed) {
  topic_keys_kernel<<<4096, 256>>>(static_cast<std::uint16_t*>(k),
                                   std::int64_t{pages} * kv_heads * page_tokens * head_dim, kv_heads, page_tokens,
                                   head_dim, seed);
  return cudaGetLastError();
}

cudaError_t fill_topic_queries(const TopicQueries& args, std::uint64_t seed) {
  topic_queries_kernel<<<static_cast<unsigned>(args.requests * args.chunk_tokens * args.q_heads),
                         static_cast<unsigned>(args.head_dim)>>>(args, seed);
  return cudaGetLastError();
}

cudaError_t fill_normal(void* data, std::int64_t elements, DType dtype, std::uint64_t seed) {
  fill_kernel<<<4096, 256>>>(static_cast<std::uint16_t*>(data), elements, dtype == DType::kF16, seed);
  return cudaGetLastError();
}

}  // namespace compact::bench
