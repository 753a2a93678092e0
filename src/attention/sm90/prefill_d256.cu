#include "src/attention/sm90/prefill.cuh"

namespace compact {
namespace {
struct Tile {
  static constexpr Sm90Tile kTile = kSm90TileD256;
};
}  // namespace

cudaError_t sm90_run_d256(DType dtype, const Sm90Arguments& arguments, int num_sms, cudaStream_t stream) {
  return dtype == DType::kBF16 ? sm90_run<ptx::MmaType::kBf16, Tile>(arguments, num_sms, stream)
                               : sm90_run<ptx::MmaType::kF16, Tile>(arguments, num_sms, stream);
}

}  // namespace compact
