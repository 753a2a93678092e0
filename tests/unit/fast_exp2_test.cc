// 2^x of src/core/fast_exp2-inl.h against std::exp2 in double, for the instruction set that this file is compiled for.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "hwy/highway.h"
#include "src/core/fast_exp2-inl.h"

namespace compact {
namespace {

float exp2_of(float x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::ScalableTag<float> d;
  return hn::GetLane(HWY_NAMESPACE::fast_exp2(d, hn::Set(d, x)));
}

TEST(FastExp2, RelativeErrorIsBelow2e7) {
  double largest = 0;
  for (std::int32_t i = -126 * 4096; i <= 126 * 4096; i += 3) {
    const float x = static_cast<float>(i) / 4096.0F;
    const double exact = std::exp2(static_cast<double>(x));
    largest = std::max(largest, std::abs(static_cast<double>(exp2_of(x)) / exact - 1));
  }
  EXPECT_LT(largest, 2e-7);
}

TEST(FastExp2, EdgesAreExact) {
  EXPECT_EQ(exp2_of(0), 1.0F);
  EXPECT_EQ(exp2_of(-1), 0.5F);
  EXPECT_EQ(exp2_of(-126), std::ldexp(1.0F, -126));
  EXPECT_EQ(exp2_of(-127), 0.0F);
  EXPECT_EQ(exp2_of(-1e30F), 0.0F);
  EXPECT_EQ(exp2_of(-std::numeric_limits<float>::infinity()), 0.0F);
}

}  // namespace
}  // namespace compact
