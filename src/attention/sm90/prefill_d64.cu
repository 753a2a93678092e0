#include "src/attention/sm90/prefill.cuh"

namespace compact {
namespace {
struct Tile {
  static constexpr Sm90Tile kTile = kSm90TileD64;
};
}  // namespace

cudaError_t sm90_run_d64(const Sm90Arguments& arguments, cudaStream_t stream) {
  return sm90_run<Tile>(arguments, stream);
}

}  // namespace compact
