// The logarithm of a register of sums of exponentials, and whether any lane of a condition holds.
#pragma once
#include "vec.h"

namespace jaxext::JAXEXT_ISA {

JAXEXT_INLINE bool any(vi x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
  return !_mm_testz_si128((__m128i)x, (__m128i)x);
#endif
}

// pivot + log(x), for x >= 1 or 0 or NaN: the whole part of log2(x) is added to the pivot first, where it often cancels.
// Cephes' polynomial.
JAXEXT_INLINE vf log_onto(vf pivot, vf x) {
  const vi k = ((vi)x - 0x3f3504f3) >> 23;  // from sqrt(1/2) to sqrt(2)
  const vf n = __builtin_convertvector(k, vf), f = (vf)((vi)x - (k << 23)) - splat(1.f), square = f * f;
  vf p = splat(7.0376836292e-2f);
  p = fma(p, f, splat(-1.1514610310e-1f));
  p = fma(p, f, splat(1.1676998740e-1f));
  p = fma(p, f, splat(-1.2420140846e-1f));
  p = fma(p, f, splat(1.4249322787e-1f));
  p = fma(p, f, splat(-1.6668057665e-1f));
  p = fma(p, f, splat(2.0000714765e-1f));
  p = fma(p, f, splat(-2.4999993993e-1f));
  p = fma(p, f, splat(3.3333331174e-1f));
  const vf bent = fma(splat(-0.5f), square, fma(p * f, square, n * splat(-2.12194440e-4f)));
  const vf log = fma(n, splat(0.693359375f), pivot) + (f + bent);
  return select(x == vf{}, splat(-__builtin_inff()), select(x != x, x, log));
}

}  // namespace jaxext::JAXEXT_ISA
