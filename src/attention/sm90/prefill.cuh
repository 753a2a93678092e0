// Prefill attention over page lists, sm_90a: O = softmax(scale * Q K^T) V with K and V read in place from the paged
// cache. Deep dive, cycle budget and version log: docs/design/sm90-kernel.md.
//
// A CTA is persistent and works on one item at a time: BM packed query rows of one KV head against a range of KV tiles
// (BN list coordinates each), walked from the last tile to the first, so that masks and the list's tail come first,
// once.
//   producers two warps: one draws items, posts them in a mailbox and loads Q and K by TMA, the other loads V. A tile
//             is loaded as boxes of min(P, BN) rows x 64 elements, one page each; the page id is a TMA coordinate.
//   consumers BM/64 warpgroups of 64 rows: S = Q K^T (wgmma), online softmax in registers, O += P V (wgmma, P in
//   registers).
// Pipelines: K and V rings of `stages` tiles, one Q tile, one mailbox. Barriers and their arrivals: sm90_config.h.
// Within a warpgroup the softmax of tile t-1 runs under P V of tile t; between warpgroups the GEMMs take turns.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "src/core/launch_kernel.h"
#include "src/attention/epilogue.cuh"
#include "src/attention/mask.cuh"
#include "src/attention/sm90/arguments.h"
#include "src/attention/sm90/sm90_config.h"
#include "src/attention/softmax.cuh"
#include "src/attention/work_item.h"
#include "src/ptx/control.cuh"
#include "src/ptx/ldmatrix.cuh"
#include "src/ptx/mbarrier.cuh"
#include "src/ptx/shared_address.cuh"
#include "src/ptx/smem_descriptor.cuh"
#include "src/ptx/tma.cuh"
#include "src/ptx/wgmma.cuh"

namespace compact {

// Position in a ring of stages: which stage, and the parity of the phase to wait for.
template <int kStages>
struct Sm90RingPosition {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ Sm90RingPosition next() const {
    return stage + 1 == kStages ? Sm90RingPosition{0, parity ^ 1} : Sm90RingPosition{stage + 1, parity};
  }
};

// Mark in WorkItem::tile_end of the mailbox: there is no more work.
inline constexpr int kSm90Stop = -1;

template <Sm90Tile kTile>
__device__ __forceinline__ void sm90_init_barriers(Sm90SharedPlan<kTile>& shared) {
  for (int stage = 0; stage < kTile.stages; ++stage) {
    ptx::mbarrier_init(&shared.k_full[stage], 1);
    ptx::mbarrier_init(&shared.v_full[stage], 1);
    ptx::mbarrier_init(&shared.k_empty[stage], kTile.consumer_warps());
    ptx::mbarrier_init(&shared.v_empty[stage], kTile.consumer_warps());
  }
  ptx::mbarrier_init(&shared.q_full, 1);
  ptx::mbarrier_init(&shared.q_empty, kTile.consumer_warps());
  for (int slot = 0; slot < kSm90MailSlots; ++slot) {
    ptx::mbarrier_init(&shared.mail_full[slot], 32);
    ptx::mbarrier_init(&shared.mail_empty[slot], kTile.consumer_warps() + 1);
  }
  ptx::fence_mbarrier_init();
#ifdef COMPACT_PTX_SPIN_LIMIT  // names for the addresses that mbarrier_wait reports
  if (blockIdx.x == 0) {
    printf(
        "warp 0 loads Q and K, warp 1 V, warps 4.. compute; barriers from: k_full %u k_empty %u v_full %u v_empty %u "
        "q_full %u ",
        ptx::shared_address(shared.k_full), ptx::shared_address(shared.k_empty), ptx::shared_address(shared.v_full),
        ptx::shared_address(shared.v_empty), ptx::shared_address(&shared.q_full));
    printf("q_empty %u mail_full %u mail_empty %u\n", ptx::shared_address(&shared.q_empty),
           ptx::shared_address(shared.mail_full), ptx::shared_address(shared.mail_empty));
  }
#endif
}

// How a loading warp brings in a tile of K or V: BN / box_rows boxes x panels TMA loads, one per lane.
template <Sm90Tile kTile>
class Sm90TileLoader {
 public:
  __device__ __forceinline__ Sm90TileLoader(const Sm90Arguments& arguments, const CUtensorMap& map)
      : arguments_(arguments), map_(map) {}

  __device__ __forceinline__ void load(const WorkItem& item, int tile, void* stage, std::uint64_t* full,
                                       std::uint64_t* empty, std::uint32_t parity) const {
    // From the lane every time: kept, these numbers cost registers that a loading warp does not have.
    const int lane = ptx::lane_id(), panel = lane % kTile.panels();
    const int box_row = lane / kTile.panels() * arguments_.box_rows;
    const PrefillParams& params = arguments_.params;
    // Page id of this lane's box; past the list -1, which as an unsigned number is out of bounds like a wrong id. It is
    // on its way while this warp waits for the stage.
    const int coordinate = tile * kTile.tokens + box_row;
    const bool loads = box_row < kTile.tokens;
    const bool listed = loads && coordinate < item.list_tokens;
    const int page = listed ? params.page_ids[item.list_begin + (coordinate >> params.page_tokens_log2)] : -1;
    ptx::mbarrier_wait(empty, parity ^ 1);
    if (lane == 0) ptx::mbarrier_arrive_expect_tx(full, kTile.kv_bytes());
    __syncwarp();
    if (loads) {
      // Page num_pages does not exist: TMA writes zeros.
      const int existing = static_cast<int>(min(static_cast<unsigned>(page), static_cast<unsigned>(params.num_pages)));
      const int row_in_page = coordinate & ((1 << params.page_tokens_log2) - 1);
      const int offset = (panel * kTile.tokens + box_row) * ptx::kSwizzleRowBytes;
      ptx::tma_load_4d(static_cast<char*>(stage) + offset, &map_, full, panel * kSm90PanelElements, row_in_page,
                       item.kv_head, existing);
    }
  }

 private:
  const Sm90Arguments& arguments_;
  const CUtensorMap& map_;
};

// The warp that draws items, posts them, and loads Q and K; all 32 lanes converged.
template <Sm90Tile kTile>
__device__ __forceinline__ void sm90_load_qk(const Sm90Arguments& arguments, Sm90SharedPlan<kTile>& shared) {
  const PrefillParams& params = arguments.params;
  constexpr int kItemWords = sizeof(WorkItem) / 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Sm90TileLoader<kTile> loader(arguments, arguments.k_map);
  Sm90RingPosition<kTile.stages> ring;
  Sm90RingPosition<kSm90MailSlots> mail;
  std::uint32_t q_parity = 0;

  for (int item_idx = static_cast<int>(blockIdx.x);;) {
    const bool stop = item_idx >= *params.num_items;
    int word = kSm90Stop;
    if (!stop && lane < kItemWords) word = reinterpret_cast<const int*>(params.work + item_idx)[lane];
    const WorkItem& item = shared.mailbox[mail.stage];
    ptx::mbarrier_wait(&shared.mail_empty[mail.stage], mail.parity ^ 1);
    if (lane < kItemWords) reinterpret_cast<int*>(&shared.mailbox[mail.stage])[lane] = word;
    ptx::mbarrier_arrive(&shared.mail_full[mail.stage]);  // every lane for its own word
    __syncwarp();                                         // this warp reads the item too
    mail = mail.next();
    if (stop) break;
    if (lane == 0) item_idx = atomicAdd(params.work_counter, 1);  // on its way while this item is loaded

    if (item.tile_begin < item.tile_end) {
      auto load_q = [&] {
        ptx::mbarrier_wait(&shared.q_empty, q_parity ^ 1);
        if (lane == 0) ptx::mbarrier_arrive_expect_tx(&shared.q_full, kTile.q_bytes());
        __syncwarp();
        if (lane < kTile.panels()) {
          ptx::tma_load_3d(&shared.q[lane], &arguments.q_map, &shared.q_full, lane * kSm90PanelElements, item.q_head,
                           item.q_row, ptx::make_policy_evict_first());
        }
        q_parity ^= 1;
      };
      // Q comes after the first two tiles of K, whose stages are free before the item before is finished with its Q.
      for (int tile = item.tile_end - 1; tile >= item.tile_begin; --tile) {
        loader.load(item, tile, shared.k[ring.stage], &shared.k_full[ring.stage], &shared.k_empty[ring.stage],
                    ring.parity);
        ring = ring.next();
        if (tile == max(item.tile_end - 2, item.tile_begin)) load_q();
      }
    }
    item_idx = __shfl_sync(0xffffffffu, item_idx, 0);
  }
  ptx::griddep_launch_dependents();
}

// The warp that loads V of the items that the other one posts.
template <Sm90Tile kTile>
__device__ __forceinline__ void sm90_load_v(const Sm90Arguments& arguments, Sm90SharedPlan<kTile>& shared) {
  const Sm90TileLoader<kTile> loader(arguments, arguments.v_map);
  Sm90RingPosition<kTile.stages> ring;
  Sm90RingPosition<kSm90MailSlots> mail;
  for (;;) {
    ptx::mbarrier_wait(&shared.mail_full[mail.stage], mail.parity);
    const WorkItem& item = shared.mailbox[mail.stage];
    if (item.tile_end == kSm90Stop) break;
    for (int tile = item.tile_end - 1; tile >= item.tile_begin; --tile) {
      loader.load(item, tile, shared.v[ring.stage], &shared.v_full[ring.stage], &shared.v_empty[ring.stage],
                  ring.parity);
      ring = ring.next();
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.mail_empty[mail.stage]);
    mail = mail.next();
  }
}

// The loading warpgroup. Two warps, because a box costs its warp about 80 clocks: with pages of 16 tokens one warp
// would take as long for K and V of a tile as the tensor cores.
template <Sm90Tile kTile>
__device__ __forceinline__ void sm90_produce(const Sm90Arguments& arguments, Sm90SharedPlan<kTile>& shared) {
  if (threadIdx.x < 32) {
    sm90_load_qk<kTile>(arguments, shared);
  } else if (threadIdx.x < 64) {
    sm90_load_v<kTile>(arguments, shared);
  }
}

// A consumer warpgroup.
template <ptx::MmaType kType, Sm90Tile kTile>
__device__ __forceinline__ void sm90_consume(const PrefillParams& params, Sm90SharedPlan<kTile>& shared) {
  constexpr int kD = kTile.head_dim, kBN = kTile.tokens, kGroups = kTile.consumer_groups();
  constexpr int kPanelSteps = kSm90PanelElements / 16;  // reduction steps of Q K^T per panel
  using MmaQk = ptx::Wgmma<kType, kBN>;
  using MmaPv = ptx::Wgmma<kType, kD>;
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128 - 1, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // This thread's rows of the tile: first_row and first_row + 8.
  const int first_row = 64 * group + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane / 4;
  const float scale_log2 = params.scale_log2;

  const ptx::SmemDescriptor q_descriptor = ptx::k_major_descriptor(ptx::shared_address(&shared.q[0][64 * group]));
  const ptx::SmemDescriptor k_descriptor = ptx::k_major_descriptor(ptx::shared_address(&shared.k));
  const ptx::SmemDescriptor v_descriptor =
      ptx::n_major_descriptor(ptx::shared_address(&shared.v), sizeof(shared.v[0][0]));

  float s[kBN / 2];          // scores, then probabilities, of the tile at hand: 64 x BN
  std::uint32_t p[kBN / 4];  // probabilities of the tile before, operand of P V
  float o[kD / 2];           // 64 x D
  std::uint32_t q[kTile.q_registers ? kD / 4 : 1];
  float row_max[2], row_sum[2], rescale[2];
  // Tiles are consumed in order, in the K ring and in the V ring alike; `ring` is the next tile of V. K is at `ring`
  // for the first tile of an item and one tile ahead after it.
  Sm90RingPosition<kTile.stages> ring;
  Sm90RingPosition<kSm90MailSlots> mail;
  std::uint32_t q_parity = 0;

  auto release = [&](std::uint64_t* empty) {  // this warp has read its last of a stage
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(empty);
  };
  auto issue_qk = [&](int stage) {
    const ptx::SmemDescriptor k = k_descriptor.advanced(stage * kTile.kv_bytes()).uniform();
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      const int panel = step / kPanelSteps, column_bytes = step % kPanelSteps * 32;
      const std::uint64_t k_step = k.advanced(panel * int{sizeof(shared.k[0][0])} + column_bytes).bits();
      if constexpr (kTile.q_registers) {
        MmaQk::template rs<false>(s, &q[4 * step], k_step, step > 0);
      } else {
        const std::uint64_t q_step = q_descriptor.advanced(panel * int{sizeof(shared.q[0])} + column_bytes).bits();
        MmaQk::template ss<false>(s, q_step, k_step, step > 0);
      }
    }
    ptx::wgmma_commit();
  };
  auto issue_pv = [&](int stage) {
    const ptx::SmemDescriptor v = v_descriptor.advanced(stage * kTile.kv_bytes()).uniform();
#pragma unroll
    for (int step = 0; step < kBN / 16; ++step) {
      MmaPv::template rs<true>(o, &p[4 * step], v.advanced(step * 16 * ptx::kSwizzleRowBytes).bits(), true);
    }
    ptx::wgmma_commit();
  };
  // Before wgmma_fence: the registers that other instructions changed. Scores are zeroed although the first step of
  // Q K^T ignores them: otherwise the old ones count as live.
  auto ready_qk = [&] {
#pragma unroll
    for (float& x : s) x = 0.0f;
    ptx::pin_registers(s);
  };
  auto ready_pv = [&] {
    ptx::pin_registers(p);
    ptx::pin_registers(o);
  };
  auto wait_turn = [&] {
    if constexpr (kTile.turns) ptx::named_barrier_sync(kSm90TurnBarrier + group, 256);
  };
  auto pass_turn = [&] {
    const int next = group + 1 == kGroups ? 0 : group + 1;
    if constexpr (kTile.turns) ptx::named_barrier_arrive(kSm90TurnBarrier + next, 256);
  };
  if (group == kGroups - 1) pass_turn();  // the first turn is group 0's

  for (;;) {
    ptx::mbarrier_wait(&shared.mail_full[mail.stage], mail.parity);
    const WorkItem& item = shared.mailbox[mail.stage];
    const int tile_begin = item.tile_begin;
    int tile = item.tile_end;  // the tile of the scores at hand
    if (tile == kSm90Stop) break;

#pragma unroll
    for (float& x : o) x = 0.0f;
    row_max[0] = row_max[1] = -INFINITY;
    row_sum[0] = row_sum[1] = 0.0f;

    if (tile_begin < tile) {
      --tile;
      // Columns that a row sees, counted from the start of the list.
      const int visible_end[2] = {
          min(item.list_tokens, item.visible_base + (first_row >> params.output.heads_per_tile_log2) + 1),
          min(item.list_tokens, item.visible_base + ((first_row + 8) >> params.output.heads_per_tile_log2) + 1)};
      auto mask = [&](int tile) { mask_columns(s, {visible_end[0] - tile * kBN, visible_end[1] - tile * kBN}, lane); };

      ptx::mbarrier_wait(&shared.q_full, q_parity);
      q_parity ^= 1;
      if constexpr (kTile.q_registers) {
        const int row = first_row - lane / 4 + lane % 16;
#pragma unroll
        for (int step = 0; step < kD / 16; ++step) {
          const int column_bytes = step % kPanelSteps * 32 + lane / 16 * 16;
          ptx::ldmatrix_x4(&q[4 * step],
                           ptx::shared_address(&shared.q[step / kPanelSteps]) + ptx::swizzle_128b(row, column_bytes));
        }
        release(&shared.q_empty);
      }

      // First tile: nothing to overlap with.
      ptx::mbarrier_wait(&shared.k_full[ring.stage], ring.parity);
      ready_qk();
      ptx::wgmma_fence();
      issue_qk(ring.stage);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(s);
      release(&shared.k_empty[ring.stage]);
      if (!kTile.q_registers && tile == tile_begin) release(&shared.q_empty);
      mask(tile);
      online_softmax<true>(s, row_max, row_sum, rescale, scale_log2);
      pack_probabilities<kType>(p, s);

      ptx::mbarrier_wait(&shared.v_full[ring.stage], ring.parity);
      if ((tile + 1) * kBN > item.list_tokens) {
        // V rows past the list: probability 0 times whatever lies in the page (NaN included) must be 0.
        const int tail = item.list_tokens - tile * kBN;
        constexpr int kRowPieces = ptx::kSwizzleRowBytes / 16;
        for (int i = static_cast<int>(threadIdx.x) - 128; i < kTile.panels() * (kBN - tail) * kRowPieces;
             i += 128 * kGroups) {
          const int row = i / kRowPieces;
          auto* pieces =
              reinterpret_cast<uint4*>(shared.v[ring.stage][row % kTile.panels()][tail + row / kTile.panels()]);
          pieces[i % kRowPieces] = make_uint4(0, 0, 0, 0);
        }
        ptx::fence_proxy_async_shared();
        ptx::named_barrier_sync(kSm90TailZeroedBarrier, 128 * kGroups);
      }

      auto step = [&]<bool kMasked>() {
        --tile;
        const Sm90RingPosition<kTile.stages> k_ring = ring.next();
        if constexpr (kTile.overlap) {
          ptx::mbarrier_wait(&shared.k_full[k_ring.stage], k_ring.parity);
          wait_turn();
          ready_qk();
          ready_pv();
          ptx::wgmma_fence();
          issue_qk(k_ring.stage);
          issue_pv(ring.stage);
          pass_turn();
          ptx::wgmma_wait<1>();
          ptx::pin_registers(s);
        } else {
          ready_pv();
          ptx::wgmma_fence();
          issue_pv(ring.stage);
          ptx::wgmma_wait<0>();
          ptx::pin_registers(o);
          ptx::mbarrier_wait(&shared.k_full[k_ring.stage], k_ring.parity);
          ready_qk();
          ptx::wgmma_fence();
          issue_qk(k_ring.stage);
          ptx::wgmma_wait<0>();
          ptx::pin_registers(s);
        }
        release(&shared.k_empty[k_ring.stage]);
        if (!kTile.q_registers && tile == tile_begin) release(&shared.q_empty);
        if constexpr (kMasked) mask(tile);
        online_softmax<kMasked>(s, row_max, row_sum, rescale, scale_log2);
        ptx::pin_registers(s);
        // V of the next step. Waiting here ends a basic block: without it the compiler moves the softmax behind the
        // wait for P V, and nothing overlaps. The stage of V(tile) is free: the step before released it.
        ptx::mbarrier_wait(&shared.v_full[k_ring.stage], k_ring.parity);
        ptx::wgmma_wait<0>();
        ptx::pin_registers(o);
        ptx::pin_registers(p);
        release(&shared.v_empty[ring.stage]);
        ring = k_ring;
        rescale_rows(o, rescale);
        pack_probabilities<kType>(p, s);
      };
      const int last_masked = max(tile_begin, item.first_masked_tile);
      while (tile > last_masked) step.template operator()<true>();
      while (tile > tile_begin) step.template operator()<false>();

      ready_pv();
      ptx::wgmma_fence();
      issue_pv(ring.stage);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(o);
      release(&shared.v_empty[ring.stage]);
      ring = ring.next();
    }

    store_item_rows<kType, kTile.rows>(params.output, item, o, row_max, row_sum, scale_log2, first_row, lane);
    release(&shared.mail_empty[mail.stage]);
    mail = mail.next();
  }
  // The last group has passed one more turn than group 0 took.
  if (group == 0) wait_turn();
}

// TileType::kTile is the tile; a type, because nvcc cannot name kernels by class-type template arguments.
template <ptx::MmaType kType, class TileType>
__global__ void __launch_bounds__(TileType::kTile.threads(), 1)
    sm90_prefill_kernel(const __grid_constant__ Sm90Arguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr Sm90Tile kTile = TileType::kTile;
  static_assert(kTile.rows % 64 == 0 && kTile.tokens % 16 == 0 && kTile.head_dim % kSm90PanelElements == 0);
  static_assert(kTile.tokens / 16 * kTile.panels() <= 32, "one lane per TMA box, for pages of 16 tokens too");
  static_assert(kSm90SharedBytes<kTile> <= kSm90MaxSharedBytes, "shared memory of the tile exceeds 227 KB");
  static_assert(128 * (kTile.producer_registers() + kTile.consumer_groups() * kTile.consumer_registers()) <= 65536,
                "register budgets exceed the register file");
  // The swizzle needs the plan on a multiple of 1024 bytes. Dynamic shared memory begins on one if the kernel has no
  // static shared memory; better a trap than wrong numbers should that ever change.
  extern __shared__ __align__(1024) char raw_shared[];
  auto& shared = *reinterpret_cast<Sm90SharedPlan<kTile>*>(raw_shared);
  if (ptx::shared_address(raw_shared) % ptx::kSwizzleAtomBytes != 0) __trap();

  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&arguments.q_map);
    ptx::prefetch_tensor_map(&arguments.k_map);
    ptx::prefetch_tensor_map(&arguments.v_map);
    sm90_init_barriers<kTile>(shared);
  }
  __syncthreads();
  ptx::griddep_wait();  // work, lists, Q, K and V are written; nobody reads the output's old content any more

  if (threadIdx.x < 128) {
    ptx::setmaxnreg_decrease<kTile.producer_registers()>();
    sm90_produce<kTile>(arguments, shared);
  } else {
    ptx::setmaxnreg_increase<kTile.consumer_registers()>();
    sm90_consume<kType, kTile>(arguments.params, shared);
  }
#endif
}

template <class TileType>
[[nodiscard]] cudaError_t sm90_run_kernel(void (*kernel)(Sm90Arguments), const Sm90Arguments& arguments,
                                          cudaStream_t stream) {
  constexpr int kBytes = kSm90SharedBytes<TileType::kTile>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, arguments.params.num_workers, TileType::kTile.threads(), kBytes, true, stream,
                       arguments);
}

template <class TileType>
[[nodiscard]] cudaError_t sm90_run(const Sm90Arguments& arguments, cudaStream_t stream) {
  return sm90_run_kernel<TileType>(arguments.params.dtype == DType::kF16
                                       ? sm90_prefill_kernel<ptx::MmaType::kF16, TileType>
                                       : sm90_prefill_kernel<ptx::MmaType::kBf16, TileType>,
                                   arguments, stream);
}

}  // namespace compact
