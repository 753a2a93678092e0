#include "src/attention/sm90/prefill.cuh"

namespace compact {
namespace {
struct Tile {
  static constexpr Sm90Tile kTile = kSm90TileD128;
};
}  // namespace

cudaError_t sm90_run_d128(const Sm90Arguments& arguments, cudaStream_t stream) {
  return sm90_run<Tile>(arguments, stream);
}

}  // namespace compact
