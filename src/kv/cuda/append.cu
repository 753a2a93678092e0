// The append: a CTA per (touched page, KV head) writes K and V and the mean, further CTAs turn the queries.
//
// A warp owns a granule of w tokens of a page and one of K, V. For K a lane owns D/64 neighbouring dimensions of the
// low half and those they rotate with, so that norm, rotation and granule sum need no shared memory: the sum of a
// dimension is taken by one thread, token after token, as docs/design/method.md 2.2 wants it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "src/core/launch_kernel.h"
#include "src/kv/cuda/launch.h"
#include "src/ptx/control.cuh"
#include "src/ptx/convert.cuh"

namespace compact {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr std::int32_t kWarp = 32;
// Rows that a warp has in flight: as many as registers hold.
template <int kDim>
constexpr int kBatch = kDim == 256 ? 4 : 8;
constexpr std::int32_t kHeadBatch = 4;  // query heads that a warp turns by one reading of the angles

// kN neighbouring 16-bit values, moved by one instruction.
template <int kN>
struct alignas(2 * kN) Values {
  std::uint16_t bits[kN];
};

template <ptx::MmaType kType>
__device__ __forceinline__ float widen(std::uint16_t bits) {
  if constexpr (kType == ptx::MmaType::kBf16) return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
  return __half2float(__ushort_as_half(bits));
}

template <ptx::MmaType kType>
__device__ __forceinline__ std::uint16_t narrow(float value) {
  if constexpr (kType == ptx::MmaType::kBf16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  return __half_as_ushort(__float2half_rn(value));
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// A lane's part of one head of one row: dimensions [kN lane, kN lane + kN) and the same plus D/2.
template <int kDim>
struct HeadPart {
  static constexpr int kN = kDim / (2 * kWarp);
  Values<kN> low, high;

  __device__ __forceinline__ void load(const std::uint16_t* head, int lane) {
    low = reinterpret_cast<const Values<kN>*>(head)[lane];
    high = reinterpret_cast<const Values<kN>*>(head + kDim / 2)[lane];
  }
  __device__ __forceinline__ void store(std::uint16_t* head, int lane) const {
    reinterpret_cast<Values<kN>*>(head)[lane] = low;
    reinterpret_cast<Values<kN>*>(head + kDim / 2)[lane] = high;
  }
};

template <int kDim>
struct Weights {
  static constexpr int kN = HeadPart<kDim>::kN;
  float low[kN], high[kN];

  __device__ __forceinline__ void load(const float* weights, int lane) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      low[i] = weights == nullptr ? 1.0f : weights[lane * kN + i];
      high[i] = weights == nullptr ? 1.0f : weights[kDim / 2 + lane * kN + i];
    }
  }
};

// Norm and rotation of a row, rounded once. angles: [D/2] of the row, or null. All lanes take part.
template <ptx::MmaType kType, int kDim>
__device__ __forceinline__ void turn(HeadPart<kDim>& part, bool norm, const Weights<kDim>& weights, float eps,
                                     const float2 (&angles)[HeadPart<kDim>::kN]) {
  constexpr int kN = HeadPart<kDim>::kN;
  float low[kN], high[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    low[i] = widen<kType>(part.low.bits[i]);
    high[i] = widen<kType>(part.high.bits[i]);
  }
  if (norm) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kN; ++i) squares += low[i] * low[i] + high[i] * high[i];
    const float scale = rsqrtf(warp_sum(squares) / kDim + eps);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      low[i] *= scale * weights.low[i];
      high[i] *= scale * weights.high[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    part.low.bits[i] = narrow<kType>(low[i] * angles[i].x - high[i] * angles[i].y);
    part.high.bits[i] = narrow<kType>(high[i] * angles[i].x + low[i] * angles[i].y);
  }
}

template <int kN>
__device__ __forceinline__ void load_angles(const float* table, std::int64_t row, int half_dim, int lane,
                                            float2 (&angles)[kN]) {
  const auto* from = reinterpret_cast<const float2*>(table) + row * half_dim + lane * kN;
#pragma unroll
  for (int i = 0; i < kN; ++i) angles[i] = table == nullptr ? float2{1, 0} : from[i];
}

__device__ __forceinline__ std::int32_t touched_pages(const AppendArgs& a, const CudaChunk& chunk) {
  const std::int64_t end = std::int64_t{chunk.chunk_start} + chunk.chunk_tokens;
  if (chunk.chunk_tokens <= 0 || chunk.chunk_start < 0 || chunk.q_begin < 0 || end > a.max_context_tokens ||
      std::int64_t{chunk.q_begin} + chunk.chunk_tokens > a.num_q_tokens || chunk.table_row < 0 ||
      chunk.table_row >= a.num_table_rows) {
    return 0;
  }
  return static_cast<std::int32_t>((end - 1) / a.kv.page_tokens) - chunk.chunk_start / a.kv.page_tokens + 1;
}

// The index-th touched page, counted over the chunks: its chunk and its logical number. All lanes get the same.
__device__ __forceinline__ bool find_page(const AppendArgs& a, std::int32_t index, int lane, CudaChunk& chunk,
                                          std::int32_t& logical) {
  for (std::int32_t first = 0; first < a.num_chunks; first += kWarp) {
    CudaChunk mine;
    std::int32_t pages = 0;
    if (first + lane < a.num_chunks) {
      mine = a.chunks[first + lane];
      pages = touched_pages(a, mine);
    }
    std::int32_t end = pages;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const std::int32_t before = __shfl_up_sync(kAllLanes, end, step);
      if (lane >= step) end += before;
    }
    const unsigned reached = __ballot_sync(kAllLanes, index < end);
    if (reached != 0) {
      const int owner = __ffs(static_cast<int>(reached)) - 1;
      chunk.q_begin = __shfl_sync(kAllLanes, mine.q_begin, owner);
      chunk.chunk_tokens = __shfl_sync(kAllLanes, mine.chunk_tokens, owner);
      chunk.chunk_start = __shfl_sync(kAllLanes, mine.chunk_start, owner);
      chunk.table_row = __shfl_sync(kAllLanes, mine.table_row, owner);
      logical = chunk.chunk_start / a.kv.page_tokens + index - __shfl_sync(kAllLanes, end - pages, owner);
      return true;
    }
    index -= __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  return false;
}

// What the warps of a CTA know of their page.
struct PagePart {
  CudaChunk chunk;
  std::int64_t at = 0;     // element offset of (page, KV head)
  std::int32_t first = 0;  // position of the page's first token
  std::int32_t head = 0;   // KV head
  bool sums = false;       // the chunk completes the page, and means are kept
};

// The tokens of a granule that the chunk brings.
template <int kDim>
__device__ __forceinline__ void copy_values(const AppendArgs& a, const PagePart& p, std::int32_t granule_begin,
                                            std::int32_t granule_end, int lane) {
  using Part = Values<kDim / kWarp>;
  constexpr int kRows = kBatch<kDim>;
  const std::int32_t begin = max(granule_begin, p.chunk.chunk_start - p.first);
  const std::int32_t end = min(granule_end, p.chunk.chunk_start + p.chunk.chunk_tokens - p.first);
  const auto* from = static_cast<const std::uint16_t*>(a.in.v) + p.head * a.in.v_head_stride +
                     (std::int64_t{p.chunk.q_begin} + p.first - p.chunk.chunk_start) * a.in.v_token_stride;
  auto* to = static_cast<std::uint16_t*>(const_cast<void*>(a.kv.v)) + p.at;
  for (std::int32_t t = begin; t < end; t += kRows) {
    Part rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (t + i < end) rows[i] = reinterpret_cast<const Part*>(from + (t + i) * a.in.v_token_stride)[lane];
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (t + i < end) reinterpret_cast<Part*>(to + (t + i) * a.kv.token_stride)[lane] = rows[i];
    }
  }
}

// The same of K, normed and turned; `sums` [D] gets the granule's sum if it is wanted, earlier tokens of the page
// included.
template <ptx::MmaType kType, int kDim>
__device__ __forceinline__ void turn_keys(const AppendArgs& a, const PagePart& p, std::int32_t granule_begin,
                                          std::int32_t granule_end, int lane, float* sums) {
  constexpr int kN = HeadPart<kDim>::kN;
  constexpr int kRows = kBatch<kDim>;
  const std::int32_t old_end = p.chunk.chunk_start - p.first;  // tokens of the page below it are there already
  const std::int32_t begin = p.sums ? granule_begin : max(granule_begin, old_end);
  const std::int32_t end = min(granule_end, old_end + p.chunk.chunk_tokens);
  const std::int64_t first_row = std::int64_t{p.chunk.q_begin} + p.first - p.chunk.chunk_start;
  const auto* from = static_cast<const std::uint16_t*>(a.in.k) + p.head * a.in.k_head_stride;
  auto* to = static_cast<std::uint16_t*>(const_cast<void*>(a.kv.k)) + p.at;
  Weights<kDim> weights;
  weights.load(a.in.k_norm, lane);
  float low_sum[kN] = {}, high_sum[kN] = {};
  for (std::int32_t t = begin; t < end; t += kRows) {
    HeadPart<kDim> rows[kRows];
    float2 angles[kRows][kN];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (t + i >= end) continue;
      if (t + i < old_end) {
        rows[i].load(to + (t + i) * a.kv.token_stride, lane);
      } else {
        rows[i].load(from + (first_row + t + i) * a.in.k_token_stride, lane);
        load_angles(a.in.rope_table, first_row + t + i, kDim / 2, lane, angles[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (t + i >= end) continue;
      if (t + i >= old_end) {
        turn<kType>(rows[i], a.in.k_norm != nullptr, weights, a.in.norm_eps, angles[i]);
        rows[i].store(to + (t + i) * a.kv.token_stride, lane);
      }
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        low_sum[j] += widen<kType>(rows[i].low.bits[j]);
        high_sum[j] += widen<kType>(rows[i].high.bits[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    sums[lane * kN + j] = low_sum[j];
    sums[kDim / 2 + lane * kN + j] = high_sum[j];
  }
}

template <ptx::MmaType kType, int kDim>
__device__ __forceinline__ void append_page(const AppendArgs& a, std::int32_t cta, float* granule_sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  PagePart p;
  p.head = cta % a.kv.num_kv_heads;
  std::int32_t logical = 0;
  if (!find_page(a, cta / a.kv.num_kv_heads, lane, p.chunk, logical)) return;
  const std::int32_t page = a.page_tables[p.chunk.table_row * a.page_table_stride + logical];
  if (page < 0 || page >= a.kv.num_pages) return;
  const std::int32_t page_tokens = a.kv.page_tokens;
  p.first = logical * page_tokens;
  p.at = page * a.kv.page_stride + p.head * a.kv.head_stride;
  const bool completes = p.chunk.chunk_start + p.chunk.chunk_tokens - p.first >= page_tokens;
  p.sums = completes && a.mean_k != nullptr;
  const std::int32_t granule = granule_tokens(page_tokens);
  const std::int32_t granules = page_tokens / granule;
  const std::int32_t mine = warp % granules * granule;
  if (warp < granules) {
    turn_keys<kType, kDim>(a, p, mine, mine + granule, lane, granule_sums + warp * kDim);
  } else {
    copy_values<kDim>(a, p, mine, mine + granule, lane);
  }
  if (threadIdx.x == 0 && p.head == 0 && a.mean_tokens != nullptr) a.mean_tokens[page] = completes ? page_tokens : 0;
  if (!p.sums) return;
  __syncthreads();
  auto* mean = a.mean_k + (std::int64_t{page} * a.kv.num_kv_heads + p.head) * kDim;
  for (std::int32_t d = static_cast<std::int32_t>(threadIdx.x); d < kDim; d += static_cast<std::int32_t>(blockDim.x)) {
    float total = granule_sums[d];
    for (std::int32_t g = 1; g < granules; ++g) total += granule_sums[g * kDim + d];
    mean[d] = narrow<kType>(__fdiv_rn(total, static_cast<float>(page_tokens)));
  }
}

template <ptx::MmaType kType, int kDim>
__device__ __forceinline__ void turn_queries(const AppendArgs& a, std::int32_t cta) {
  constexpr int kN = HeadPart<kDim>::kN;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int32_t head_batches = (a.num_q_heads + kHeadBatch - 1) / kHeadBatch;
  const std::int64_t item = std::int64_t{cta} * (blockDim.x / kWarp) + static_cast<std::int64_t>(threadIdx.x) / kWarp;
  const std::int64_t row = item / head_batches;
  if (row >= a.num_q_tokens) return;
  const std::int32_t first_head = static_cast<std::int32_t>(item % head_batches) * kHeadBatch;
  float2 angles[kN];
  load_angles(a.in.rope_table, row, kDim / 2, lane, angles);
  if (angles[0].x == 0 && angles[0].y == 0) return;  // a row of no chunk
  auto* q = static_cast<std::uint16_t*>(a.in.q) + row * a.in.q_token_stride + first_head * a.in.q_head_stride;
  Weights<kDim> weights;
  weights.load(a.in.q_norm, lane);
  HeadPart<kDim> heads[kHeadBatch];
#pragma unroll
  for (int i = 0; i < kHeadBatch; ++i) {
    if (first_head + i < a.num_q_heads) heads[i].load(q + i * a.in.q_head_stride, lane);
  }
#pragma unroll
  for (int i = 0; i < kHeadBatch; ++i) {
    if (first_head + i >= a.num_q_heads) continue;
    turn<kType>(heads[i], a.in.q_norm != nullptr, weights, a.in.norm_eps, angles);
    heads[i].store(q + i * a.in.q_head_stride, lane);
  }
}

constexpr std::int32_t kMaxGranules = 8;  // P = 256

template <ptx::MmaType kType, int kDim>
__global__ void __launch_bounds__(2 * kMaxGranules * kWarp) append_kernel(AppendArgs args) {
  __shared__ float granule_sums[kMaxGranules * kDim];  // [P/w, D]
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const auto cta = static_cast<std::int32_t>(blockIdx.x);
  const std::int32_t page_ctas = args.max_pages * args.kv.num_kv_heads;
  if (cta < page_ctas) {
    append_page<kType, kDim>(args, cta, granule_sums);
  } else {
    turn_queries<kType, kDim>(args, cta - page_ctas);
  }
}

// A CTA per row of Q. Angles are rounded to fp32; cosine and sine of a large one need exact range reduction, so fp64.
__global__ void rope_table_kernel(RopeTableArgs args) {
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const auto row = static_cast<std::int32_t>(blockIdx.x);
  std::int32_t position = -1;
  for (std::int32_t b = 0; b < args.num_chunks; ++b) {
    const CudaChunk chunk = args.chunks[b];
    if (row >= chunk.q_begin && row - chunk.q_begin < chunk.chunk_tokens) {
      position = chunk.chunk_start + row - chunk.q_begin;
      break;
    }
  }
  for (auto i = static_cast<std::int32_t>(threadIdx.x); i < args.half_dim; i += static_cast<std::int32_t>(blockDim.x)) {
    float2 pair{0, 0};
    if (position >= 0) {
      double sine = 0, cosine = 0;
      sincos(static_cast<double>(__fmul_rn(args.inverse_frequencies[i], static_cast<float>(position))), &sine, &cosine);
      pair = {static_cast<float>(cosine), static_cast<float>(sine)};
    }
    args.table[std::int64_t{row} * args.half_dim + i] = pair;
  }
}

template <ptx::MmaType kType>
cudaError_t launch(const AppendArgs& args, std::int32_t ctas, std::int32_t threads, bool pdl, cudaStream_t stream) {
  switch (args.kv.head_dim) {
    case 64: return launch_kernel(append_kernel<kType, 64>, ctas, threads, 0, pdl, stream, args);
    case 128: return launch_kernel(append_kernel<kType, 128>, ctas, threads, 0, pdl, stream, args);
    default: return launch_kernel(append_kernel<kType, 256>, ctas, threads, 0, pdl, stream, args);
  }
}

}  // namespace

cudaError_t launch_rope_table(const RopeTableArgs& args, bool pdl, cudaStream_t stream) {
  return launch_kernel(rope_table_kernel, args.num_q_tokens, 64, 0, pdl, stream, args);
}

cudaError_t launch_append(const AppendArgs& args, bool pdl, cudaStream_t stream) {
  const std::int32_t warps = 2 * args.kv.page_tokens / granule_tokens(args.kv.page_tokens);
  const std::int32_t items = args.num_q_tokens * ((args.num_q_heads + kHeadBatch - 1) / kHeadBatch);
  const std::int32_t ctas = args.max_pages * args.kv.num_kv_heads + (items + warps - 1) / warps;
  return args.kv.dtype == DType::kF16 ? launch<ptx::MmaType::kF16>(args, ctas, warps * kWarp, pdl, stream)
                                      : launch<ptx::MmaType::kBf16>(args, ctas, warps * kWarp, pdl, stream);
}

}  // namespace compact
