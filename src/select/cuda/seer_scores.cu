// Scores of `seer` (seer.h), fp32 throughout as on the CPU: four small kernels.
//
//   rope      cosine and sine of the positions 64 j
//   queries   a CTA per (mask head, query block): pooled queries, their map, rotation, 1 / sqrt(D)
//   keys      a CTA per (chunk, 32 key blocks, key map): pools times map and rotation in registers, then their products
//             with every query block of the chunk. Mapped keys are not stored
//   softmax   a CTA per (mask head, query block): E of its pages
#include <cmath>
#include <cstdint>

#include "src/core/count_bits.h"
#include "src/core/launch_kernel.h"
#include "src/ptx/control.cuh"
#include "src/ptx/unpack.cuh"
#include "src/select/cuda/scores.h"

namespace compact {
namespace {

constexpr std::int32_t kThreads = 256;
constexpr std::int32_t kWarps = kThreads / 32;
constexpr std::int32_t kKeyBlocks = 32;  // of a CTA
constexpr std::int32_t kWarpKeys = kKeyBlocks / kWarps;
constexpr std::int32_t kDepth = 32;  // of a step of the key map

struct SeerArgs {
  StepQueries step;        // q before RoPE
  const float* gate_pool;  // [num_pages, Hkv, P/64, 3, D]
  DeviceGates gates;
  std::int32_t head_dim;
  std::int32_t num_kv_heads;
  std::int32_t pooled_heads;      // query heads of a mask head
  std::int32_t page_blocks_log2;  // P / 64
  std::int32_t max_key_blocks;
  float* rope;     // [max_key_blocks, D/2, 2]  cosine, sine
  float* queries;  // [mask_heads, max_blocks, D]
  float* scores;   // [mask_heads, max_blocks, max_key_blocks]
  ScoreRows rows;

  __device__ __forceinline__ bool chooses(const StepChunk& chunk) const {
    return has_choice(chunk, kGateBlockTokens << page_blocks_log2);
  }
};

__global__ void __launch_bounds__(kThreads, 2) seer_rope_kernel(const __grid_constant__ SeerArgs args) {
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const std::int32_t half = args.head_dim / 2;
  const std::int32_t i = static_cast<std::int32_t>(blockIdx.x) * kThreads + static_cast<std::int32_t>(threadIdx.x);
  if (i >= args.max_key_blocks * half) return;
  const auto position = static_cast<float>(i / half * kGateBlockTokens);
  double sine = 0, cosine = 0;  // of large angles: fp64
  sincos(static_cast<double>(__fmul_rn(args.gates.inverse_frequencies[i % half], position)), &sine, &cosine);
  reinterpret_cast<float2*>(args.rope)[i] = {static_cast<float>(cosine), static_cast<float>(sine)};
}

template <ptx::MmaType kType>
__global__ void __launch_bounds__(kThreads, 2) seer_queries_kernel(const __grid_constant__ SeerArgs args) {
  extern __shared__ __align__(1024) float shared[];  // pooled [pooled_heads, D], then mapped [D]
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const std::int32_t block_idx = static_cast<std::int32_t>(blockIdx.x) / args.rows.mask_heads;
  const std::int32_t head = static_cast<std::int32_t>(blockIdx.x) - block_idx * args.rows.mask_heads;
  if (block_idx >= args.step.tables.header->num_blocks) return;
  const QueryBlock block = args.step.tables.blocks[block_idx];
  if (block.tokens == 0 || !args.chooses(args.step.tables.chunks[block.chunk])) return;
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  const std::int32_t dim = args.head_dim, in = args.pooled_heads * dim, half = dim / 2;
  float* mapped = shared + in;
  for (std::int32_t i = 2 * thread; i < in; i += 2 * kThreads) {
    const std::uint16_t* q = args.step.q + block.q_begin * args.step.q_token_stride +
                             (head * args.pooled_heads + i / dim) * args.step.q_head_stride + i % dim;
    float2 sum{};
    for (std::int32_t t = 0; t < block.tokens; ++t) {
      const float2 x =
          ptx::unpack_pair<kType>(*reinterpret_cast<const std::uint32_t*>(q + t * args.step.q_token_stride));
      sum.x += x.x;
      sum.y += x.y;
    }
    shared[i] = sum.x / static_cast<float>(block.tokens);
    shared[i + 1] = sum.y / static_cast<float>(block.tokens);
  }
  __syncthreads();
  if (args.gates.query != nullptr) {
    const float* map = args.gates.query + std::int64_t{head} * in * dim;
    for (std::int32_t d = thread; d < dim; d += kThreads) {
      float sum = 0;
      for (std::int32_t x = 0; x < in; ++x) sum = fmaf(shared[x], map[std::int64_t{x} * dim + d], sum);
      mapped[d] = sum;
    }
    __syncthreads();
  } else {
    mapped = shared;
  }
  const float scale = rsqrtf(static_cast<float>(dim));
  const auto* rope =
      reinterpret_cast<const float2*>(args.rope) + std::int64_t{block.first_position / kGateBlockTokens} * half;
  float* out = args.queries + (std::int64_t{head} * args.rows.max_blocks + block_idx) * dim;
  for (std::int32_t d = thread; d < half; d += kThreads) {
    const float low = mapped[d], high = mapped[d + half];
    out[d] = (low * rope[d].x - high * rope[d].y) * scale;
    out[d + half] = (high * rope[d].x + low * rope[d].y) * scale;
  }
}

template <std::int32_t kHeadDim>
struct SeerKeysShared {
  float pools[kDepth][kKeyBlocks + 1];  // one more: writes go down a column
  float map[kDepth][kHeadDim];
  float keys[kKeyBlocks][kHeadDim + 1];
};

template <std::int32_t kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) seer_keys_kernel(const __grid_constant__ SeerArgs args) {
  constexpr std::int32_t kLaneColumns = kHeadDim / 32;  // columns lane, lane + 32, ...: a pair of RoPE in one thread
  extern __shared__ __align__(1024) float shared_memory[];
  auto& shared = *reinterpret_cast<SeerKeysShared<kHeadDim>*>(shared_memory);
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  auto index = static_cast<std::int32_t>(blockIdx.x);
  const std::int32_t key_head = index % args.gates.key_heads;
  index /= args.gates.key_heads;
  const std::int32_t key_tiles = (args.max_key_blocks + kKeyBlocks - 1) / kKeyBlocks;
  const StepChunk chunk = args.step.tables.chunks[index / key_tiles];
  const std::int32_t first_key = index % key_tiles * kKeyBlocks;
  if (!args.chooses(chunk)) return;
  const std::int32_t num_keys = (chunk.chunk_start + chunk.chunk_tokens + kGateBlockTokens - 1) / kGateBlockTokens;
  if (first_key >= num_keys) return;
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  const std::int32_t lane = thread % 32, warp = thread / 32;
  const std::int32_t kv_head = key_head * args.num_kv_heads / args.gates.key_heads;
  const std::int32_t* table = args.step.page_tables + chunk.table_row * args.step.page_table_stride;
  const float* map = args.gates.key + std::int64_t{key_head} * 3 * kHeadDim * kHeadDim;

  float keys[kWarpKeys][kLaneColumns] = {};  // of the key blocks 4 warp and on
#pragma unroll 1
  for (std::int32_t first = 0; first < 3 * kHeadDim; first += kDepth) {
    for (std::int32_t i = thread; i < kDepth * kKeyBlocks; i += kThreads) {
      const std::int32_t j = first_key + i / kDepth, x = i % kDepth;
      float value = 0.0f;
      if (j < num_keys) {
        const std::int64_t record = (std::int64_t{table[j >> args.page_blocks_log2]} * args.num_kv_heads + kv_head)
                                    << args.page_blocks_log2;
        const std::int64_t pool = record + (j & ((1 << args.page_blocks_log2) - 1));
        value = args.gate_pool[pool * 3 * kHeadDim + first + x];
      }
      shared.pools[x][i / kDepth] = value;
    }
    for (std::int32_t i = thread; i < kDepth * kHeadDim; i += kThreads) {
      shared.map[i / kHeadDim][i % kHeadDim] = map[std::int64_t{first} * kHeadDim + i];
    }
    __syncthreads();
#pragma unroll 8
    for (std::int32_t x = 0; x < kDepth; ++x) {
      float weight[kLaneColumns];
#pragma unroll
      for (std::int32_t c = 0; c < kLaneColumns; ++c) weight[c] = shared.map[x][32 * c + lane];
#pragma unroll
      for (std::int32_t k = 0; k < kWarpKeys; ++k) {
        const float pool = shared.pools[x][warp * kWarpKeys + k];
#pragma unroll
        for (std::int32_t c = 0; c < kLaneColumns; ++c) keys[k][c] = fmaf(pool, weight[c], keys[k][c]);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (std::int32_t k = 0; k < kWarpKeys; ++k) {
    const std::int32_t j = first_key + warp * kWarpKeys + k;
    const auto* rope = reinterpret_cast<const float2*>(args.rope) + std::int64_t{j} * (kHeadDim / 2);
#pragma unroll
    for (std::int32_t c = 0; c < kLaneColumns / 2; ++c) {
      const float low = keys[k][c], high = keys[k][c + kLaneColumns / 2];
      const float2 turn = j < num_keys ? rope[32 * c + lane] : float2{0, 0};
      shared.keys[warp * kWarpKeys + k][32 * c + lane] = low * turn.x - high * turn.y;
      shared.keys[warp * kWarpKeys + k][32 * c + lane + kHeadDim / 2] = high * turn.x + low * turn.y;
    }
  }
  __syncthreads();

  const std::int32_t heads = args.rows.mask_heads / args.gates.key_heads;  // that share the map
  const std::int32_t num_blocks = num_runs(chunk.chunk_start, chunk.chunk_tokens, kGateBlockTokens);
  for (std::int32_t i = warp; i < heads * num_blocks; i += kWarps) {
    const std::int64_t row =
        std::int64_t{key_head * heads + i / num_blocks} * args.rows.max_blocks + chunk.first_block + i % num_blocks;
    const float* query = args.queries + row * kHeadDim;
    float sum = 0;
#pragma unroll 8
    for (std::int32_t d = 0; d < kHeadDim; ++d) sum = fmaf(query[d], shared.keys[lane][d], sum);
    if (first_key + lane < num_keys) args.scores[row * args.max_key_blocks + first_key + lane] = sum;
  }
}

// The same in all lanes and warps; `parts` is free again behind the next barrier.
template <class Join>
__device__ __forceinline__ float join_threads(float x, float* parts, Join join) {
#pragma unroll
  for (std::int32_t offset = 16; offset > 0; offset /= 2) x = join(x, __shfl_xor_sync(0xffffffffu, x, offset));
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
  for (std::int32_t warp = 1; warp < kWarps; ++warp) x = join(x, parts[warp]);
  return x;
}

__global__ void __launch_bounds__(kThreads, 2) seer_softmax_kernel(const __grid_constant__ SeerArgs args) {
  __shared__ float parts[3][kWarps];
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const std::int32_t block_idx = static_cast<std::int32_t>(blockIdx.x) / args.rows.mask_heads;
  const std::int32_t head = static_cast<std::int32_t>(blockIdx.x) - block_idx * args.rows.mask_heads;
  if (block_idx >= args.step.tables.header->num_blocks) return;
  const QueryBlock block = args.step.tables.blocks[block_idx];
  if (block.tokens == 0) return;
  const StepChunk chunk = args.step.tables.chunks[block.chunk];
  if (!args.chooses(chunk)) return;
  const std::int64_t row = std::int64_t{head} * args.rows.max_blocks + block_idx;
  const float* scores = args.scores + row * args.max_key_blocks;
  const std::int32_t count = block.first_position / kGateBlockTokens + 1;
  const std::int32_t page_blocks = 1 << args.page_blocks_log2;
  const auto thread = static_cast<std::int32_t>(threadIdx.x);

  float largest = -INFINITY, sum = 0.0f;
  for (std::int32_t j = thread; j < count; j += kThreads) largest = fmaxf(largest, scores[j]);
  largest = join_threads(largest, parts[0], [](float a, float b) { return fmaxf(a, b); });
  for (std::int32_t j = thread; j < count; j += kThreads) sum += expf(scores[j] - largest);  // NaN for a bad row
  sum = join_threads(sum, parts[1], [](float a, float b) { return a + b; });
  const bool bad = !(sum > 0.0f && sum < INFINITY);
  if (thread == 0) args.rows.nonfinite[row] = bad ? block.tokens * args.pooled_heads : 0;
  if (bad) return;
  const std::int32_t past_pages = chunk.chunk_start / kGateBlockTokens >> args.page_blocks_log2;
  float elsewhere = 0.0f;
  for (std::int32_t page = thread; page * page_blocks < count; page += kThreads) {
    float best = -INFINITY;
    for (std::int32_t j = page * page_blocks; j < min(count, (page + 1) * page_blocks); ++j) {
      best = fmaxf(best, scores[j]);
    }
    const float probability = expf(best - largest) / sum;
    if (page < past_pages) {
      args.rows.scores[row * args.rows.row_stride + page] = probability;
    } else {
      elsewhere += probability;
    }
  }
  elsewhere = join_threads(elsewhere, parts[2], [](float a, float b) { return a + b; });
  if (thread == 0) args.rows.elsewhere[row] = elsewhere;
}

template <std::int32_t kHeadDim>
cudaError_t launch_keys(const SeerArgs& args, std::int32_t num_chunks, bool pdl, cudaStream_t stream) {
  constexpr auto kBytes = static_cast<std::int32_t>(sizeof(SeerKeysShared<kHeadDim>));
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(seer_keys_kernel<kHeadDim>),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const std::int32_t key_tiles = (args.max_key_blocks + kKeyBlocks - 1) / kKeyBlocks;
  return launch_kernel(seer_keys_kernel<kHeadDim>, num_chunks * key_tiles * args.gates.key_heads, kThreads, kBytes, pdl,
                       stream, args);
}

std::int32_t num_key_blocks(const ScoreArgs& args) { return args.max_context_tokens / kGateBlockTokens + 1; }
std::int64_t rope_floats(const ScoreArgs& args) { return std::int64_t{num_key_blocks(args)} * args.head_dim; }
std::int64_t query_floats(const ScoreArgs& args, const ScoreRows& rows) {
  return std::int64_t{rows.mask_heads} * rows.max_blocks * args.head_dim;
}

}  // namespace

std::int64_t seer_scratch_bytes(const ScoreArgs& args, const ScoreRows& rows, const DeviceGates&) {
  const std::int64_t scores = std::int64_t{rows.mask_heads} * rows.max_blocks * num_key_blocks(args);
  return (rope_floats(args) + query_floats(args, rows) + scores) * 4;
}

cudaError_t launch_seer_scores(const ScoreArgs& args, const ScoreRows& rows, const DeviceGates& gates,
                               cudaStream_t stream) {
  if (args.scratch_bytes < seer_scratch_bytes(args, rows, gates) || args.page_tokens % kGateBlockTokens != 0 ||
      args.block_tokens != kGateBlockTokens) {
    return cudaErrorInvalidValue;
  }
  SeerArgs seer{};
  seer.step = args.step;
  seer.gate_pool = args.summaries.gate_pool;
  seer.gates = gates;
  seer.head_dim = args.head_dim;
  seer.num_kv_heads = args.num_kv_heads;
  seer.pooled_heads = args.num_kv_heads * args.group / rows.mask_heads;
  seer.page_blocks_log2 = log2_exact(args.page_tokens / kGateBlockTokens);
  seer.max_key_blocks = num_key_blocks(args);
  seer.rope = static_cast<float*>(args.scratch);
  seer.queries = seer.rope + rope_floats(args);
  seer.scores = seer.queries + query_floats(args, rows);
  seer.rows = rows;

  const std::int32_t rope_ctas = (seer.max_key_blocks * (args.head_dim / 2) + kThreads - 1) / kThreads;
  cudaError_t error = launch_kernel(seer_rope_kernel, rope_ctas, kThreads, 0, args.pdl, stream, seer);
  if (error != cudaSuccess) return error;
  const auto queries =
      args.kv.dtype == DType::kF16 ? seer_queries_kernel<ptx::MmaType::kF16> : seer_queries_kernel<ptx::MmaType::kBf16>;
  const std::int32_t query_bytes = (seer.pooled_heads + 1) * args.head_dim * 4;
  error = cudaFuncSetAttribute(reinterpret_cast<const void*>(queries), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               query_bytes);
  if (error != cudaSuccess) return error;
  const std::int32_t num_rows = rows.max_blocks * rows.mask_heads;
  error = launch_kernel(queries, num_rows, kThreads, query_bytes, args.pdl, stream, seer);
  if (error != cudaSuccess) return error;
  switch (args.head_dim) {
    case 64: error = launch_keys<64>(seer, args.num_chunks, args.pdl, stream); break;
    case 128: error = launch_keys<128>(seer, args.num_chunks, args.pdl, stream); break;
    case 256: error = launch_keys<256>(seer, args.num_chunks, args.pdl, stream); break;
    default: return cudaErrorInvalidValue;
  }
  if (error != cudaSuccess) return error;
  return launch_kernel(seer_softmax_kernel, num_rows, kThreads, 0, args.pdl, stream, seer);
}

}  // namespace compact
