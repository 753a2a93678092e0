// Adds the partial results of cut M-tiles in the order of their pieces:
//   M = max m_k,  w_k = exp2(m_k - M),  O = sum w_k O_k / sum w_k l_k,  LSE = (M + log2(sum w_k l_k)) ln 2.
// A row that saw nothing in any piece: O = 0, LSE = -inf. One warp per row; the rows of an M-tile are shared out over
// its slots, so every slot costs BM row reads whatever the number of pieces. No atomics: same input, same bits.
#include "src/attention/cuda/launch.h"
#include "src/core/launch_kernel.h"
#include "src/attention/epilogue.cuh"
#include "src/ptx/control.cuh"
#include "src/ptx/convert.cuh"

namespace compact {
namespace {

constexpr std::int32_t kThreads = 256;
constexpr std::int32_t kWarps = kThreads / 32;
constexpr std::int32_t kCtasPerSm = 4;

// kCount consecutive values, a power of two of them: one or more vector accesses.
template <class T, std::int32_t kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Vector {
  T x[kCount];
};

template <ptx::MmaType kType, std::int32_t kHeadDim>
__global__ void __launch_bounds__(kThreads) combine_kernel(CombineArgs args) {
  const PrefillOutput& out = args.output;
  constexpr std::int32_t kPerLane = kHeadDim / 32;
  ptx::griddep_wait();
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x) % 32;
  const std::int32_t warp = static_cast<std::int32_t>(threadIdx.x) / 32;
  const auto* m_l = reinterpret_cast<const float2*>(out.partial_m_l);
  const std::int32_t num_slots = args.header->num_slots;
  for (std::int32_t slot = static_cast<std::int32_t>(blockIdx.x); slot < num_slots;
       slot += static_cast<std::int32_t>(gridDim.x)) {
    const SlotItem item = args.slots[slot];
    const std::int32_t row_end = args.tile_rows * (item.piece + 1) / item.num_pieces;
    for (std::int32_t row = args.tile_rows * item.piece / item.num_pieces + warp; row < row_end; row += kWarps) {
      const std::int32_t token_in_tile = row >> out.heads_per_tile_log2;
      if (token_in_tile >= item.q_rows_valid) break;
      const std::int64_t first = std::int64_t{item.first_slot} * args.tile_rows + row;  // piece k: + k * tile_rows

      float largest = -INFINITY;
      for (std::int32_t k = lane; k < item.num_pieces; k += 32) {
        largest = fmaxf(largest, m_l[first + std::int64_t{k} * args.tile_rows].x);
      }
      for (std::int32_t step = 16; step > 0; step /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
      }

      float sum = 0;
      float mixed[kPerLane] = {};
#pragma unroll 4
      for (std::int32_t k = 0; k < item.num_pieces; ++k) {
        const std::int64_t at = first + std::int64_t{k} * args.tile_rows;
        const float2 max_and_sum = m_l[at];
        const float weight = max_and_sum.x == -INFINITY ? 0.0f : exp2f(max_and_sum.x - largest);
        const auto o =
            *reinterpret_cast<const Vector<float, kPerLane>*>(out.partial_o + at * kHeadDim + lane * kPerLane);
        sum += weight * max_and_sum.y;
        for (std::int32_t i = 0; i < kPerLane; ++i) mixed[i] += weight * o.x[i];
      }

      const float factor = normaliser(sum);
      const std::int64_t token = item.q_row + token_in_tile;
      const std::int32_t head = item.q_head + (row & ((1 << out.heads_per_tile_log2) - 1));
      Vector<std::uint32_t, kPerLane / 2> pairs;
      for (std::int32_t i = 0; i < kPerLane / 2; ++i) {
        pairs.x[i] = ptx::pack_pair<kType>(mixed[2 * i] * factor, mixed[2 * i + 1] * factor);
      }
      std::uint16_t* o = out.o + token * out.o_token_stride + head * out.o_head_stride + lane * kPerLane;
      *reinterpret_cast<Vector<std::uint32_t, kPerLane / 2>*>(o) = pairs;
      if (out.lse != nullptr && lane == 0) out.lse[token * out.num_q_heads + head] = natural_lse(largest, sum);
    }
  }
}

template <std::int32_t kHeadDim>
cudaError_t launch(const CombineArgs& args, std::int32_t num_sms, bool pdl, cudaStream_t stream) {
  const auto kernel = args.dtype == DType::kF16 ? combine_kernel<ptx::MmaType::kF16, kHeadDim>
                                                : combine_kernel<ptx::MmaType::kBf16, kHeadDim>;
  return launch_kernel(kernel, kCtasPerSm * num_sms, kThreads, 0, pdl, stream, args);
}

}  // namespace

cudaError_t launch_combine(const CombineArgs& args, std::int32_t num_sms, bool pdl, cudaStream_t stream) {
  switch (args.head_dim) {
    case 64: return launch<64>(args, num_sms, pdl, stream);
    case 128: return launch<128>(args, num_sms, pdl, stream);
    case 256: return launch<256>(args, num_sms, pdl, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace compact
