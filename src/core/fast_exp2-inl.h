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

/// 2^x for x <= 127, relative error below 2e-7, exactly 1 at x = 0. Results below 2^-126 are 0, and so is 2^-inf: masked
/// scores vanish. A NaN is not kept: callers test their scores.
///
/// x = n + f with |f| <= 1/2; 2^f is the degree 5 polynomial of least largest relative error with value 1 at 0; 2^n goes
/// into the exponent bits.
template <class D, class V = hwy::HWY_NAMESPACE::Vec<D>>
HWY_INLINE V fast_exp2(D d, V x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::RebindToSigned<D> di;
  x = hn::Max(x, hn::Set(d, -127.0F));  // n = -127 gives biased exponent 0, hence 0
  const auto n = hn::NearestInt(x);
  const V f = hn::Sub(x, hn::ConvertTo(d, n));
  V p = hn::Set(d, 0.00132647273F);
  p = hn::MulAdd(p, f, hn::Set(d, 0.00967151299F));
  p = hn::MulAdd(p, f, hn::Set(d, 0.0555073358F));
  p = hn::MulAdd(p, f, hn::Set(d, 0.240222424F));
  p = hn::MulAdd(p, f, hn::Set(d, 0.693147004F));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0F));
  const auto scale = hn::ShiftLeft<23>(hn::Add(n, hn::Set(di, 127)));
  return hn::Mul(p, hn::BitCast(d, scale));
}

}  // namespace HWY_NAMESPACE
}  // namespace compact
HWY_AFTER_NAMESPACE();

#endif  // COMPACT_CORE_FAST_EXP2_INL_H_
