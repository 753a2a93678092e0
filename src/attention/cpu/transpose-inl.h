// 4 x 4 transpose in 128-bit registers, for every instruction set. Include inside foreach_target.
#if defined(COMPACT_ATTENTION_CPU_TRANSPOSE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef COMPACT_ATTENTION_CPU_TRANSPOSE_INL_H_
#undef COMPACT_ATTENTION_CPU_TRANSPOSE_INL_H_
#else
#define COMPACT_ATTENTION_CPU_TRANSPOSE_INL_H_
#endif

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace compact::cpu {
namespace HWY_NAMESPACE {

// Element j of register i becomes element i of register j. T: 32 bits.
template <class T>
HWY_INLINE void transpose_4x4(hwy::HWY_NAMESPACE::Vec<hwy::HWY_NAMESPACE::FixedTag<T, 4>>* HWY_RESTRICT rows) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::FixedTag<T, 4> d;
  const auto low01 = hn::InterleaveLower(d, rows[0], rows[1]);
  const auto high01 = hn::InterleaveUpper(d, rows[0], rows[1]);
  const auto low23 = hn::InterleaveLower(d, rows[2], rows[3]);
  const auto high23 = hn::InterleaveUpper(d, rows[2], rows[3]);
  rows[0] = hn::ConcatLowerLower(d, low23, low01);
  rows[1] = hn::ConcatUpperUpper(d, low23, low01);
  rows[2] = hn::ConcatLowerLower(d, high23, high01);
  rows[3] = hn::ConcatUpperUpper(d, high23, high01);
}

}  // namespace HWY_NAMESPACE
}  // namespace compact::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
