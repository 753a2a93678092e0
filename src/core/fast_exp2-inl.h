// 2^x for vectors, compiled once per instruction set (Highway; include after hwy/highway.h inside foreach_target).
#if defined(COMPACT_CORE_FAST_EXP2_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef COMPACT_CORE_FAST_EXP2_INL_H_
#undef COMPACT_CORE_FAST_EXP2_INL_H_
#else
#define COMPACT_CORE_FAST_EXP2_INL_H_
#endif

#include <cstdint>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace compact {
namespace HWY_NAMESPACE {

/// 2^x for x <= 127: relative error below 1.5e-7, exactly 1 at 0, exactly 0 below -126 and at -inf, NaN at NaN.
///
/// 2^x = 2^n (1 + c1 f + .. + c6 f^6), n = round(x), |f| <= 1/2; the coefficients minimise the relative error with
/// value 1 at f = 0. A degree less costs 4.3e-7, more than the rounding of the sums it goes into.
template <class D, class V = hwy::HWY_NAMESPACE::Vec<D>>
HWY_INLINE V fast_exp2(D d, V x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::RebindToSigned<D> di;
  const V shift = hn::Set(d, 12582912.0F);  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const V shifted = hn::Add(hn::Max(hn::Set(d, -126.0F), x), shift);
  const V f = hn::Sub(x, hn::Sub(shifted, shift));
  V p = hn::Set(d, 1.55946782e-4F);
  p = hn::MulAdd(p, f, hn::Set(d, 1.34066439e-3F));
  p = hn::MulAdd(p, f, hn::Set(d, 9.61769297e-3F));
  p = hn::MulAdd(p, f, hn::Set(d, 5.55031055e-2F));
  p = hn::MulAdd(p, f, hn::Set(d, 2.40226528e-1F));
  p = hn::MulAdd(p, f, hn::Set(d, 6.93147215e-1F));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0F));
  const auto scaled = hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::BitCast(di, shifted)));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0F)), hn::BitCast(d, scaled));
}

}  // namespace HWY_NAMESPACE
}  // namespace compact
HWY_AFTER_NAMESPACE();

#endif  // COMPACT_CORE_FAST_EXP2_INL_H_
