// Shape constants of the sm_90a prefill kernel: tiles, warp roles, shared-memory plan, barriers. No CUDA types: the
// scheduling takes the tile shapes from here and is tested on the CPU.
#pragma once

#include <cstdint>

#include "src/attention/work_item.h"
#include "src/core/host_device.h"

namespace compact {

inline constexpr int kSm90PanelElements = 64;  // one swizzled shared-memory row: 128 bytes of 16-bit elements
inline constexpr int kSm90MaxSharedBytes = 232448;
// Items in flight: the one at work, which consumers read until its end, and the one the producer loads ahead.
inline constexpr int kSm90MailSlots = 2;

// A tile: `rows` packed query rows (64 per consumer warpgroup) against `tokens` KV tokens.
struct Sm90Tile {
  int head_dim;
  int rows;          // BM
  int tokens;        // BN
  int stages;        // depth of the K ring and of the V ring
  bool overlap;      // softmax of a tile runs under P V of the tile before
  bool turns;        // warpgroups issue their GEMMs in turn, so that softmax of one runs under the GEMMs of another
  bool q_registers;  // Q is the register operand of Q K^T: a third less shared-memory traffic, D/4 registers

  CA_HOST_DEVICE constexpr int panels() const { return head_dim / kSm90PanelElements; }
  CA_HOST_DEVICE constexpr int consumer_groups() const { return rows / 64; }
  CA_HOST_DEVICE constexpr int consumer_warps() const { return 4 * consumer_groups(); }
  CA_HOST_DEVICE constexpr int threads() const { return 128 * (1 + consumer_groups()); }
  CA_HOST_DEVICE constexpr int q_bytes() const { return rows * head_dim * 2; }
  CA_HOST_DEVICE constexpr int kv_bytes() const { return tokens * head_dim * 2; }  // K or V of one stage
  // setmaxnreg budgets; the sum over warpgroups must fit the 64 K registers of an SM.
  CA_HOST_DEVICE constexpr int producer_registers() const { return consumer_groups() == 2 ? 24 : 32; }
  CA_HOST_DEVICE constexpr int consumer_registers() const { return consumer_groups() == 2 ? 240 : 160; }
};

inline constexpr Sm90Tile kSm90TileD64{64, 192, 128, 4, true, false, false};
inline constexpr Sm90Tile kSm90TileD128{128, 128, 128, 3, true, true, true};
inline constexpr Sm90Tile kSm90TileD256{256, 128, 64, 2, true, false, false};

// The tile that sm90_launch_prefill uses for a head dimension; rows == 0: there is no kernel.
constexpr Sm90Tile sm90_tile(int head_dim) {
  return head_dim == 64 ? kSm90TileD64 : head_dim == 128 ? kSm90TileD128 : head_dim == 256 ? kSm90TileD256 : Sm90Tile{};
}

// Named barriers (id 0 is __syncthreads, which nobody calls after the roles split).
enum Sm90NamedBarrier : int {
  kSm90TurnBarrier = 1,        // + consumer group: its turn to issue GEMMs; 128 arrive (the group before), 128 wait
  kSm90TailZeroedBarrier = 4,  // all consumers: V rows past the list are zero
};

// mbarrier, arrivals per phase                  who arrives                        who waits
//   k_full, v_full, q_full         1 + bytes    lane 0 of the loading warp, TMA    consumers
//   k_empty, v_empty, q_empty      one per consumer warp, after its last read      the loading warp
//   mail_full                      32           every lane of the Q and K warp     consumers, V warp
//   mail_empty                     one per consumer warp and V warp, item done     Q and K warp
// Readers wait for phase 0 first, writers for the phase before it (parity 1), which a fresh barrier passes.
template <Sm90Tile kTile>
struct alignas(1024) Sm90SharedPlan {
  std::uint16_t q[kTile.panels()][kTile.rows][kSm90PanelElements];
  std::uint16_t k[kTile.stages][kTile.panels()][kTile.tokens][kSm90PanelElements];
  std::uint16_t v[kTile.stages][kTile.panels()][kTile.tokens][kSm90PanelElements];
  WorkItem mailbox[kSm90MailSlots];
  std::uint64_t k_full[kTile.stages], k_empty[kTile.stages];
  std::uint64_t v_full[kTile.stages], v_empty[kTile.stages];
  std::uint64_t q_full, q_empty;
  std::uint64_t mail_full[kSm90MailSlots], mail_empty[kSm90MailSlots];
};

template <Sm90Tile kTile>
inline constexpr int kSm90SharedBytes = static_cast<int>(sizeof(Sm90SharedPlan<kTile>));

}  // namespace compact
