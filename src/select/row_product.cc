// See row_product.h.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/select/row_product.cc"
// Register blocks are arrays of vectors, which vectors of unknown length do not allow; such machines take NEON.
#ifndef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#endif
#include "src/select/row_product.h"

#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace compact {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

// 4 rows x 3 vectors of accumulators, 3 vectors of the matrix, 1 of a row: 16 registers.
constexpr int kRows = 4;
constexpr int kVecs = 3;

template <int kNumRows, int kNumVecs>
HWY_INLINE void product_block(const float* const* rows, std::int32_t depth, const float* matrix, std::int32_t width,
                              float* out) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  const auto lanes = static_cast<std::int32_t>(hn::Lanes(d));
  V acc[kNumRows][kNumVecs];
  for (int r = 0; r < kNumRows; ++r) {
    for (int v = 0; v < kNumVecs; ++v) acc[r][v] = hn::Zero(d);
  }
  for (std::int32_t x = 0; x < depth; ++x) {
    V m[kNumVecs];
    for (int v = 0; v < kNumVecs; ++v) m[v] = hn::LoadU(d, matrix + std::int64_t{x} * width + v * lanes);
    for (int r = 0; r < kNumRows; ++r) {
      const V value = hn::Set(d, rows[r][x]);
      for (int v = 0; v < kNumVecs; ++v) acc[r][v] = hn::MulAdd(value, m[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kNumRows; ++r) {
    for (int v = 0; v < kNumVecs; ++v) hn::StoreU(acc[r][v], d, out + std::int64_t{r} * width + v * lanes);
  }
}

// All columns of kNumRows rows.
template <int kNumRows>
void product_rows(const float* const* rows, std::int32_t depth, const float* matrix, std::int32_t width, float* out) {
  const auto lanes = static_cast<std::int32_t>(hn::Lanes(hn::ScalableTag<float>()));
  std::int32_t c = 0;
  for (; c + kVecs * lanes <= width; c += kVecs * lanes) {
    product_block<kNumRows, kVecs>(rows, depth, matrix + c, width, out + c);
  }
  for (; c + lanes <= width; c += lanes) product_block<kNumRows, 1>(rows, depth, matrix + c, width, out + c);
  for (; c < width; ++c) {
    for (int r = 0; r < kNumRows; ++r) {
      float sum = 0;
      for (std::int32_t x = 0; x < depth; ++x) sum += rows[r][x] * matrix[std::int64_t{x} * width + c];
      out[std::int64_t{r} * width + c] = sum;
    }
  }
}

void multiply_all(const float* const* rows, std::int64_t num_rows, std::int32_t depth, const float* matrix,
                  std::int32_t width, float* out) {
  std::int64_t i = 0;
  for (; i + kRows <= num_rows; i += kRows) product_rows<kRows>(rows + i, depth, matrix, width, out + i * width);
  for (; i < num_rows; ++i) product_rows<1>(rows + i, depth, matrix, width, out + i * width);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace compact
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace compact {

HWY_EXPORT(multiply_all);

void multiply_rows(std::span<const float* const> rows, std::int32_t depth, const float* matrix, std::int32_t width,
                   float* out) {
  HWY_DYNAMIC_DISPATCH(multiply_all)
  (rows.data(), static_cast<std::int64_t>(rows.size()), depth, matrix, width, out);
}

}  // namespace compact
#endif  // HWY_ONCE
