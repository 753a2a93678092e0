#include "engine/model/linear.h"

#include <cblas.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

namespace compact::engine {
namespace {

// Output rows a task widens and multiplies. Fixed, so that a panel's product never depends on the thread count.
// 256 rows keep OpenBLAS at its full single-thread rate at K = 256..4096 and give two cores enough tasks.
constexpr std::int32_t kPanelRows = 256;

std::int32_t num_panels(std::int32_t out_features) { return (out_features + kPanelRows - 1) / kPanelRows; }

// The pool is the one source of threads: OpenBLAS would start as many again in every one of them and make sums depend
// on their number.
void use_blas_without_threads() { [[maybe_unused]] static const bool done = (openblas_set_num_threads(1), true); }

// IEEE binary16 to binary32. Subnormals are normalised by one float multiplication.
float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
  const std::uint32_t magnitude = half & 0x7fffU;
  if (magnitude >= 0x7c00U) return std::bit_cast<float>(sign | 0x7f800000U | ((magnitude & 0x3ffU) << 13));
  // 2^112 moves the exponent bias from 15 to 127.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112F;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(scaled));
}

// Widens one element type; memcpy because a mapped tensor may start at any byte.
template <class Bits, class Convert>
void widen(const std::byte* bytes, std::int64_t count, float* out, Convert convert) {
  for (std::int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, bytes + i * static_cast<std::int64_t>(sizeof(Bits)), sizeof(Bits));
    out[i] = convert(bits);
  }
}

}  // namespace

void widen_to_f32(const TensorRef& tensor, std::int64_t first_element, std::int64_t count, float* out) {
  const std::byte* bytes = tensor.bytes.data() + first_element * data_type_bytes(tensor.dtype);
  switch (tensor.dtype) {
    case DataType::kBF16:
      widen<std::uint16_t>(bytes, count, out, [](std::uint16_t bits) {
        return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
      });
      return;
    case DataType::kF16: widen<std::uint16_t>(bytes, count, out, half_to_float); return;
    default:  // kF32; Checkpoint::tensor lets no other type through
      std::memcpy(out, bytes, static_cast<std::size_t>(count) * sizeof(float));
  }
}

// Scratch holds a panel as fp32: [kPanelRows, in].
void Linear::apply_panel(std::int32_t panel, const float* x, std::span<const std::int32_t> part_rows, float* y,
                         bool accumulate, std::vector<float>& scratch) const {
  const std::int32_t first = panel * kPanelRows;
  const std::int32_t panel_rows = std::min(kPanelRows, out_features_ - first);
  const float beta = accumulate ? 1.0F : 0.0F;
  scratch.resize(static_cast<std::size_t>(kPanelRows) * static_cast<std::size_t>(in_features_));
  widen_to_f32(weight_, std::int64_t{first} * in_features_, std::int64_t{panel_rows} * in_features_, scratch.data());
  for (const std::int32_t rows : part_rows) {
    if (rows == 1) {
      cblas_sgemv(CblasRowMajor, CblasNoTrans, panel_rows, in_features_, 1.0F, scratch.data(), in_features_, x, 1, beta,
                  y + first, 1);
    } else {
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, rows, panel_rows, in_features_, 1.0F, x, in_features_,
                  scratch.data(), in_features_, beta, y + first, out_features_);
    }
    x += std::int64_t{rows} * in_features_;
    y += std::int64_t{rows} * out_features_;
  }
}

void Linear::apply_parts(const float* x, std::span<const std::int32_t> part_rows, float* y, bool accumulate,
                         ThreadPool& pool) const {
  use_blas_without_threads();
  std::vector<std::vector<float>> scratch(static_cast<std::size_t>(pool.num_threads()));
  pool.parallel_for(num_panels(out_features_), [&](std::int64_t panel, std::int32_t thread) {
    apply_panel(static_cast<std::int32_t>(panel), x, part_rows, y, accumulate,
                scratch[static_cast<std::size_t>(thread)]);
  });
}

void Linear::apply_alone(const float* x, std::int32_t rows, float* y, bool accumulate,
                         std::vector<float>& scratch) const {
  use_blas_without_threads();
  for (std::int32_t panel = 0; panel < num_panels(out_features_); ++panel) {
    apply_panel(panel, x, std::span(&rows, 1), y, accumulate, scratch);
  }
}

}  // namespace compact::engine
