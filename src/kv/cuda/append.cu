// The append. CTAs of three kinds in one launch, a CTA of the first two per (touched page, KV head):
//
//   keys     norm and rotation in registers, into the page; with means also into shared memory, where a thread then
//   adds
//            up a dimension of a granule token after token, as docs/design/method.md 2.2 wants it
//   values   a copy
//   queries  norm and rotation in place; a thread reads the angles of its row once for several heads
//
// A thread holds 8 neighbouring dimensions of a row's low half and the 8 that they rotate with: 16-byte accesses, D/16
// threads to a row, and all rows of a CTA in flight at once.
#include <cuda_bf16.h>

#include <algorithm>

#include "src/core/launch_kernel.h"
#include "src/kv/cuda/launch.h"
#include "src/ptx/control.cuh"
#include "src/ptx/convert.cuh"
#include "src/ptx/prefetch.cuh"
#include "src/ptx/unpack.cuh"

namespace compact {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr std::int32_t kWarp = 32;
constexpr std::int32_t kThreads = 256;    // of a CTA at most
constexpr std::int32_t kVector = 8;       // elements of a 16-byte access
constexpr std::int32_t kPasses = 4;       // rows that a thread has in flight
constexpr std::int32_t kMaxGranules = 8;  // P = 256

template <int kDim>
constexpr std::int32_t kRowThreads = kDim / (2 * kVector);

struct alignas(16) Vector {
  std::uint32_t pairs[kVector / 2];
};

// A thread's part of one head of one row: dimensions [8 part, 8 part + 8) and the same plus D/2.
template <int kDim>
struct HeadPart {
  Vector low, high;

  __device__ __forceinline__ void load(const std::uint16_t* head, int part) {
    low = reinterpret_cast<const Vector*>(head)[part];
    high = reinterpret_cast<const Vector*>(head + kDim / 2)[part];
  }
  __device__ __forceinline__ void store(std::uint16_t* head, int part) const {
    reinterpret_cast<Vector*>(head)[part] = low;
    reinterpret_cast<Vector*>(head + kDim / 2)[part] = high;
  }
};

// Cosine and sine of the dimensions of a part.
struct Angles {
  float4 two[kVector / 2];  // of two dimensions: cosine, sine, cosine, sine

  __device__ __forceinline__ void load(const float* table, std::int64_t row, int half_dim, int part) {
    const auto* from = reinterpret_cast<const float4*>(table + row * 2 * half_dim) + part * (kVector / 2);
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) two[i] = table == nullptr ? float4{1, 0, 1, 0} : from[i];
  }
};

// Norm and rotation of a row, rounded once. weights: [D] or null. All threads of the row take part.
template <ptx::MmaType kType, int kDim>
__device__ __forceinline__ void turn(HeadPart<kDim>& head, int part, const float* weights, float eps,
                                     const Angles& angles) {
  float scale = 1;
  if (weights != nullptr) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const float2 low = ptx::unpack_pair<kType>(head.low.pairs[i]);
      const float2 high = ptx::unpack_pair<kType>(head.high.pairs[i]);
      squares += low.x * low.x + low.y * low.y + high.x * high.x + high.y * high.y;
    }
#pragma unroll
    for (int step = kRowThreads<kDim> / 2; step > 0; step /= 2) squares += __shfl_xor_sync(kAllLanes, squares, step);
    scale = rsqrtf(squares / kDim + eps);
  }
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    float2 low = ptx::unpack_pair<kType>(head.low.pairs[i]);
    float2 high = ptx::unpack_pair<kType>(head.high.pairs[i]);
    if (weights != nullptr) {
      const float* of_part = weights + part * kVector + 2 * i;
      low = {low.x * scale * of_part[0], low.y * scale * of_part[1]};
      high = {high.x * scale * of_part[kDim / 2], high.y * scale * of_part[kDim / 2 + 1]};
    }
    const float4 angle = angles.two[i];
    head.low.pairs[i] = ptx::pack_pair<kType>(low.x * angle.x - high.x * angle.y, low.y * angle.z - high.y * angle.w);
    head.high.pairs[i] = ptx::pack_pair<kType>(high.x * angle.x + low.x * angle.y, high.y * angle.z + low.y * angle.w);
  }
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

// A CTA's share of the append.
struct PagePart {
  CudaChunk chunk;
  std::int64_t at = 0;         // element offset of (page, KV head)
  std::int64_t first_row = 0;  // row of Q at the page's first token; may be negative
  std::int32_t page = 0;       // physical
  std::int32_t head = 0;       // KV head
  std::int32_t old_end = 0;    // tokens of the page below it are there already
  std::int32_t end = 0;        // tokens that the page holds afterwards, at most P
};

// The CTA's page, or false. Threads of a warp get the same.
__device__ __forceinline__ bool find_part(const AppendArgs& a, std::int32_t index, std::int32_t head, PagePart& part) {
  std::int32_t logical = 0;
  if (!find_page(a, index, static_cast<int>(threadIdx.x) % kWarp, part.chunk, logical)) return false;
  part.page = a.page_tables[part.chunk.table_row * a.page_table_stride + logical];
  if (part.page < 0 || part.page >= a.kv.num_pages) return false;
  part.head = head;
  part.at = part.page * a.kv.page_stride + head * a.kv.head_stride;
  const std::int32_t first = logical * a.kv.page_tokens;  // position of the page's first token
  part.old_end = max(0, part.chunk.chunk_start - first);
  part.end = min(a.kv.page_tokens, part.chunk.chunk_start + part.chunk.chunk_tokens - first);
  part.first_row = std::int64_t{part.chunk.q_begin} + first - part.chunk.chunk_start;
  return true;
}

template <int kDim>
__device__ __forceinline__ void copy_values(const AppendArgs& a, const PagePart& p) {
  const int part = static_cast<int>(threadIdx.x) % kRowThreads<kDim>;
  const auto rows = static_cast<std::int32_t>(blockDim.x) / kRowThreads<kDim>;
  const auto* from = static_cast<const std::uint16_t*>(a.in.v) + p.head * a.in.v_head_stride;
  auto* to = static_cast<std::uint16_t*>(const_cast<void*>(a.kv.v)) + p.at;
  for (std::int32_t t = p.old_end + static_cast<std::int32_t>(threadIdx.x) / kRowThreads<kDim>; t < p.end;
       t += kPasses * rows) {
    HeadPart<kDim> head[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (t + i * rows < p.end) head[i].load(from + (p.first_row + t + i * rows) * a.in.v_token_stride, part);
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (t + i * rows < p.end) head[i].store(to + (t + i * rows) * a.kv.token_stride, part);
    }
  }
}

// Sums of the granules [first, first + rows / granule) from rows in shared memory.
template <ptx::MmaType kType, int kDim>
__device__ __forceinline__ void sum_granules(const std::uint16_t* rows, std::int32_t granule, std::int32_t count,
                                             float* sums) {
  for (auto i = static_cast<std::int32_t>(threadIdx.x); i < count * (kDim / 2);
       i += static_cast<std::int32_t>(blockDim.x)) {
    const std::int32_t g = i / (kDim / 2);
    const std::int32_t pair = i % (kDim / 2);
    const auto* column = reinterpret_cast<const std::uint32_t*>(rows + g * granule * kDim) + pair;
    float2 sum{};
#pragma unroll 16
    for (std::int32_t t = 0; t < granule; ++t) {
      const float2 x = ptx::unpack_pair<kType>(column[t * (kDim / 2)]);
      sum.x += x.x;
      sum.y += x.y;
    }
    reinterpret_cast<float2*>(sums)[g * (kDim / 2) + pair] = sum;
  }
}

template <int kDim>
struct SharedKeys {
  // As stored, of as many tokens as the CTA has in flight.
  alignas(16) std::uint16_t rows[kThreads / kRowThreads<kDim> * kPasses * kDim];
  float sums[kMaxGranules * kDim];  // [P/w, D]
};

template <ptx::MmaType kType, int kDim>
__device__ __forceinline__ void turn_keys(const AppendArgs& a, const PagePart& p, SharedKeys<kDim>& shared) {
  const std::int32_t page_tokens = a.kv.page_tokens;
  const bool completes = p.end == page_tokens;
  if (threadIdx.x == 0 && p.head == 0 && a.mean_tokens != nullptr) a.mean_tokens[p.page] = completes ? page_tokens : 0;
  const bool sums = completes && a.mean_k != nullptr;
  const std::int32_t begin = sums ? 0 : p.old_end;  // a mean needs the keys that are there already
  const int part = static_cast<int>(threadIdx.x) % kRowThreads<kDim>;
  const std::int32_t my_row = static_cast<std::int32_t>(threadIdx.x) / kRowThreads<kDim>;
  const auto rows = static_cast<std::int32_t>(blockDim.x) / kRowThreads<kDim>;
  const std::int32_t granule = granule_tokens(page_tokens);
  const auto* from = static_cast<const std::uint16_t*>(a.in.k) + p.head * a.in.k_head_stride;
  auto* to = static_cast<std::uint16_t*>(const_cast<void*>(a.kv.k)) + p.at;
  for (std::int32_t slice = 0; slice < p.end; slice += kPasses * rows) {
    HeadPart<kDim> head[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const std::int32_t t = slice + i * rows + my_row;
      if (a.in.rope_table != nullptr && t >= p.old_end && t < p.end) {
        ptx::prefetch_l1(a.in.rope_table + (p.first_row + t) * kDim + part * 2 * kVector);
      }
      if (t >= begin && t < p.end) {
        head[i].load(t < p.old_end ? to + t * a.kv.token_stride : from + (p.first_row + t) * a.in.k_token_stride, part);
      }
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const std::int32_t t = slice + i * rows + my_row;
      const bool fresh = t >= p.old_end && t < p.end;
      Angles angles{};
      if (fresh) angles.load(a.in.rope_table, p.first_row + t, kDim / 2, part);
      HeadPart<kDim> turned = head[i];
      turn<kType>(turned, part, a.in.k_norm, a.in.norm_eps, angles);  // by all threads: rows shuffle
      if (fresh) {
        head[i] = turned;
        turned.store(to + t * a.kv.token_stride, part);
      }
      if (sums && t < p.end) head[i].store(shared.rows + (t - slice) * kDim, part);
    }
    if (!sums) continue;
    __syncthreads();
    sum_granules<kType, kDim>(shared.rows, granule, min(kPasses * rows, page_tokens - slice) / granule,
                              shared.sums + slice / granule * kDim);
    __syncthreads();
  }
  if (!sums) return;
  auto* mean =
      reinterpret_cast<std::uint32_t*>(a.mean_k) + (std::int64_t{p.page} * a.kv.num_kv_heads + p.head) * (kDim / 2);
  const auto count = static_cast<float>(page_tokens);
  for (auto pair = static_cast<std::int32_t>(threadIdx.x); pair < kDim / 2;
       pair += static_cast<std::int32_t>(blockDim.x)) {
    float2 total = reinterpret_cast<const float2*>(shared.sums)[pair];
    for (std::int32_t g = 1; g < page_tokens / granule; ++g) {
      const float2 sum = reinterpret_cast<const float2*>(shared.sums)[g * (kDim / 2) + pair];
      total = {total.x + sum.x, total.y + sum.y};
    }
    mean[pair] = ptx::pack_pair<kType>(__fdiv_rn(total.x, count), __fdiv_rn(total.y, count));
  }
}

// Heads of one row that a warp turns: kPasses for each of the rows that it holds side by side.
template <int kDim>
constexpr std::int32_t kWarpHeads = kPasses*(kWarp / kRowThreads<kDim>);

template <ptx::MmaType kType, int kDim>
__device__ __forceinline__ void turn_queries(const AppendArgs& a, std::int32_t cta) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int part = lane % kRowThreads<kDim>;
  const std::int32_t items_per_row = (a.num_q_heads + kWarpHeads<kDim> - 1) / kWarpHeads<kDim>;
  const std::int64_t item = (std::int64_t{cta} * blockDim.x + threadIdx.x) / kWarp;
  const std::int64_t row = item / items_per_row;
  if (row >= a.num_q_tokens) return;
  const std::int32_t first_head =
      static_cast<std::int32_t>(item % items_per_row) * kWarpHeads<kDim> + lane / kRowThreads<kDim>;
  Angles angles;
  angles.load(a.in.rope_table, row, kDim / 2, part);
  if (angles.two[0].x == 0 && angles.two[0].y == 0) return;  // a row of no chunk, for all threads
  auto* q = static_cast<std::uint16_t*>(a.in.q) + row * a.in.q_token_stride;
  constexpr std::int32_t kStep = kWarp / kRowThreads<kDim>;
  HeadPart<kDim> heads[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const std::int32_t h = first_head + i * kStep;
    if (h < a.num_q_heads) heads[i].load(q + h * a.in.q_head_stride, part);
  }
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const std::int32_t h = first_head + i * kStep;
    turn<kType>(heads[i], part, a.in.q_norm, a.in.norm_eps, angles);
    if (h < a.num_q_heads) heads[i].store(q + h * a.in.q_head_stride, part);
  }
}

template <ptx::MmaType kType, int kDim>
__global__ void __launch_bounds__(kThreads, 3) append_kernel(AppendArgs args) {
  __shared__ SharedKeys<kDim> shared;
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  const auto cta = static_cast<std::int32_t>(blockIdx.x);
  const std::int32_t page_ctas = 2 * args.max_pages * args.kv.num_kv_heads;
  if (cta >= page_ctas) {
    turn_queries<kType, kDim>(args, cta - page_ctas);
    return;
  }
  PagePart part;
  // Heads follow each other: those of a page read the same angles.
  if (!find_part(args, cta / 2 / args.kv.num_kv_heads, cta / 2 % args.kv.num_kv_heads, part)) return;
  if (cta % 2 == 0) {
    turn_keys<kType, kDim>(args, part, shared);
  } else {
    copy_values<kDim>(args, part);
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

template <ptx::MmaType kType, int kDim>
cudaError_t launch(const AppendArgs& args, bool pdl, cudaStream_t stream) {
  const std::int32_t threads = std::min(kThreads, args.kv.page_tokens * kRowThreads<kDim>);
  const std::int32_t warps = threads / kWarp;
  const std::int32_t items = args.num_q_tokens * ((args.num_q_heads + kWarpHeads<kDim> - 1) / kWarpHeads<kDim>);
  const std::int32_t ctas = 2 * args.max_pages * args.kv.num_kv_heads + (items + warps - 1) / warps;
  return launch_kernel(append_kernel<kType, kDim>, ctas, threads, 0, pdl, stream, args);
}

template <ptx::MmaType kType>
cudaError_t launch_by_dim(const AppendArgs& args, bool pdl, cudaStream_t stream) {
  switch (args.kv.head_dim) {
    case 64: return launch<kType, 64>(args, pdl, stream);
    case 128: return launch<kType, 128>(args, pdl, stream);
    default: return launch<kType, 256>(args, pdl, stream);
  }
}

}  // namespace

cudaError_t launch_rope_table(const RopeTableArgs& args, bool pdl, cudaStream_t stream) {
  return launch_kernel(rope_table_kernel, args.num_q_tokens, 64, 0, pdl, stream, args);
}

cudaError_t launch_append(const AppendArgs& args, bool pdl, cudaStream_t stream) {
  return args.kv.dtype == DType::kF16 ? launch_by_dim<ptx::MmaType::kF16>(args, pdl, stream)
                                      : launch_by_dim<ptx::MmaType::kBf16>(args, pdl, stream);
}

}  // namespace compact
