#include "benchmarks/sm90_variants.h"
#include "src/attention/sm90/prefill.cuh"

namespace compact::bench {
namespace {

constexpr auto kBf16 = ptx::MmaType::kBf16;

// ---- probes --------------------------------------------------------------------------------------------------------

enum class Probe { kLoads, kLoadsAndMmas };

// The producer as it is; consumers wait for tiles and hand them back, with the MMAs on whatever the registers hold or
// without them. The one store keeps the compiler from leaving them out.
template <Sm90Tile kTile, Probe kProbe>
__device__ __forceinline__ void consume_without_softmax(Sm90SharedPlan<kTile>& shared, float* sink) {
  constexpr int kD = kTile.head_dim, kBN = kTile.tokens;
  using MmaQk = ptx::Wgmma<kBf16, kBN>;
  using MmaPv = ptx::Wgmma<kBf16, kD>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128 - 1, 0);
  const auto release = [&](std::uint64_t* empty) {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(empty);
  };
  const auto q_descriptor = ptx::k_major_descriptor(ptx::shared_address(&shared.q[0][64 * group]));
  const auto k_descriptor = ptx::k_major_descriptor(ptx::shared_address(&shared.k));
  const auto v_descriptor = ptx::n_major_descriptor(ptx::shared_address(&shared.v), sizeof(shared.v[0][0]));
  Sm90RingPosition<kTile.stages> ring;
  Sm90RingPosition<kSm90MailSlots> mail;
  std::uint32_t q_parity = 0;
  float s[kBN / 2], o[kD / 2];
  std::uint32_t p[kBN / 4];
#pragma unroll
  for (float& x : s) x = 0;
#pragma unroll
  for (float& x : o) x = 0;
#pragma unroll
  for (std::uint32_t& x : p) x = 0x3c003c00u + threadIdx.x;
  for (;;) {
    ptx::mbarrier_wait(&shared.mail_full[mail.stage], mail.parity);
    const WorkItem& item = shared.mailbox[mail.stage];
    int tile = item.tile_end;
    if (tile == kSm90Stop) break;
    const int tile_begin = item.tile_begin;
    if (tile_begin < tile) {
      ptx::mbarrier_wait(&shared.q_full, q_parity);
      q_parity ^= 1;
      for (; tile > tile_begin; --tile) {
        ptx::mbarrier_wait(&shared.k_full[ring.stage], ring.parity);
        if constexpr (kProbe == Probe::kLoadsAndMmas) {
          ptx::pin_registers(s);
          ptx::pin_registers(o);
          ptx::pin_registers(p);
          ptx::wgmma_fence();
          const auto k = k_descriptor.advanced(ring.stage * kTile.kv_bytes()).uniform();
#pragma unroll
          for (int step = 0; step < kD / 16; ++step) {
            const int panel = step / 4, column_bytes = step % 4 * 32;
            MmaQk::template ss<false>(s, q_descriptor.advanced(panel * int{sizeof(shared.q[0])} + column_bytes).bits(),
                                      k.advanced(panel * int{sizeof(shared.k[0][0])} + column_bytes).bits(), step > 0);
          }
          ptx::wgmma_commit();
        }
        ptx::mbarrier_wait(&shared.v_full[ring.stage], ring.parity);
        if constexpr (kProbe == Probe::kLoadsAndMmas) {
          const auto v = v_descriptor.advanced(ring.stage * kTile.kv_bytes()).uniform();
#pragma unroll
          for (int step = 0; step < kBN / 16; ++step) {
            MmaPv::template rs<true>(o, &p[4 * step], v.advanced(step * 16 * ptx::kSwizzleRowBytes).bits(), true);
          }
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          ptx::pin_registers(s);
          ptx::pin_registers(o);
        }
        release(&shared.k_empty[ring.stage]);
        release(&shared.v_empty[ring.stage]);
        ring = ring.next();
      }
      release(&shared.q_empty);
    }
    release(&shared.mail_empty[mail.stage]);
    mail = mail.next();
  }
  float sum = 0;
#pragma unroll
  for (const float x : s) sum += x;
#pragma unroll
  for (const float x : o) sum += x;
  if (sum == 12345.678f) *sink = sum;
}

template <class TileType, Probe kProbe>
__global__ void __launch_bounds__(TileType::kTile.threads(), 1)
    probe_kernel(const __grid_constant__ Sm90Arguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr Sm90Tile kTile = TileType::kTile;
  extern __shared__ __align__(1024) char raw_shared[];
  auto& shared = *reinterpret_cast<Sm90SharedPlan<kTile>*>(raw_shared);
  if (threadIdx.x == 0) sm90_init_barriers<kTile>(shared);
  __syncthreads();
  ptx::griddep_wait();
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_decrease<kTile.producer_registers()>();
    sm90_produce<kTile>(arguments, shared);
  } else {
    ptx::setmaxnreg_increase<kTile.consumer_registers()>();
    consume_without_softmax<kTile, kProbe>(shared, arguments.params.output.lse);
  }
#endif
}

// ---- variants ------------------------------------------------------------------------------------------------------

template <class TileType>
cudaError_t run_tile(const Sm90Arguments& arguments, cudaStream_t stream) {
  return sm90_run_kernel<TileType>(sm90_prefill_kernel<kBf16, TileType>, arguments, stream);
}
template <class TileType, Probe kProbe>
cudaError_t run_probe(const Sm90Arguments& arguments, cudaStream_t stream) {
  return sm90_run_kernel<TileType>(probe_kernel<TileType, kProbe>, arguments, stream);
}

#define CA_TILE(NAME, ...)                         \
  struct NAME {                                    \
    static constexpr Sm90Tile kTile = __VA_ARGS__; \
  }
//                     D    BM   BN  stages overlap turns Q in registers
CA_TILE(Base, kSm90TileD128);
CA_TILE(Simple, Sm90Tile{128, 128, 128, 3, false, false, false});
CA_TILE(NoTurns, Sm90Tile{128, 128, 128, 3, true, false, false});
CA_TILE(QShared, Sm90Tile{128, 128, 128, 3, true, true, false});
CA_TILE(N192, Sm90Tile{128, 128, 192, 2, true, true, false});
CA_TILE(N192NoTurns, Sm90Tile{128, 128, 192, 2, true, false, false});
CA_TILE(N176, Sm90Tile{128, 128, 176, 2, true, true, false});
CA_TILE(N160, Sm90Tile{128, 128, 160, 2, true, true, false});
CA_TILE(M192, Sm90Tile{128, 192, 128, 2, false, false, false});
CA_TILE(D64, kSm90TileD64);
CA_TILE(D64Turns, Sm90Tile{64, 192, 128, 4, true, true, false});
CA_TILE(D64M128, Sm90Tile{64, 128, 128, 4, true, true, false});
CA_TILE(D64N192, Sm90Tile{64, 128, 192, 4, true, true, false});
CA_TILE(D256, kSm90TileD256);
CA_TILE(D256Turns, Sm90Tile{256, 128, 64, 2, true, true, false});
CA_TILE(D256N80, Sm90Tile{256, 128, 80, 2, true, false, false});
#undef CA_TILE

template <class TileType>
Variant tile_variant(const char* name) {
  return {name, TileType::kTile, run_tile<TileType>, true};
}
template <class TileType, Probe kProbe>
Variant probe(const char* name) {
  return {name, TileType::kTile, run_probe<TileType, kProbe>, false};
}

}  // namespace

std::vector<Variant> sm90_tile_variants() {
  return {tile_variant<Base>("128x128 overlap turns Q in registers"),
          tile_variant<NoTurns>("128x128 overlap"),
          tile_variant<Simple>("128x128 plain"),
          tile_variant<QShared>("128x128 overlap turns, Q in shared memory"),
          tile_variant<N192>("128x192 overlap turns"),
          tile_variant<N192NoTurns>("128x192 overlap"),
          tile_variant<N176>("128x176 overlap turns"),
          tile_variant<N160>("128x160 overlap turns"),
          tile_variant<M192>("192x128 plain"),
          tile_variant<D64>("D64 192x128 overlap"),
          tile_variant<D64Turns>("D64 192x128 overlap turns"),
          tile_variant<D64M128>("D64 128x128 overlap turns"),
          tile_variant<D64N192>("D64 128x192 overlap turns"),
          tile_variant<D256>("D256 128x64 overlap"),
          tile_variant<D256Turns>("D256 128x64 overlap turns"),
          tile_variant<D256N80>("D256 128x80 overlap")};
}

std::vector<Variant> sm90_probes() {
  return {probe<Base, Probe::kLoads>("loads 128x128"), probe<Base, Probe::kLoadsAndMmas>("loads and MMAs 128x128"),
          probe<N192, Probe::kLoads>("loads 128x192"), probe<N192, Probe::kLoadsAndMmas>("loads and MMAs 128x192")};
}

}  // namespace compact::bench
