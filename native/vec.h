// One register of floats for whichever instruction set this translation unit is compiled for: 16, 8 or 4 lanes.
// The compiler's vector extensions give + - * / and comparisons; here is what they lack.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "isa.h"
#include "sanitized.h"

namespace jaxext::JAXEXT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t bf16;  // storage only: the upper half of a float
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

// x - 0, not x + 0: the latter turns -0 to 0, so the compiler would have to add.
JAXEXT_INLINE vf splat(float x) { return x - vf{}; }
JAXEXT_INLINE vi splat_i(int32_t x) { return vi{} + x; }

JAXEXT_INLINE vi lane_index() {
  vi x;
  for (int i = 0; i < kLanes; i++) x[i] = i;
  return x;
}

JAXEXT_INLINE vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
JAXEXT_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }

JAXEXT_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }

JAXEXT_INLINE vf select(vi condition, vf yes, vf no) { return condition ? yes : no; }

// NaN in `b` is kept, as x86's max and min do: put the value that may be NaN second.
JAXEXT_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
JAXEXT_INLINE vf min(vf a, vf b) { return a < b ? a : b; }

// As XLA's maximum and minimum: NaN wins, and +0 is above -0.
JAXEXT_INLINE vf larger(vf a, vf b) {
  const vf best = select(a == b, (vf)((vi)a & (vi)b), select(a > b, a, b));
  return select(a != a, a, best);
}
JAXEXT_INLINE vf smaller(vf a, vf b) {
  const vf best = select(a == b, (vf)((vi)a | (vi)b), select(a < b, a, b));
  return select(a != a, a, best);
}

JAXEXT_INLINE float reduce_add(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s[kLanes];
  store(s, x);
  for (int w = kLanes / 2; w; w /= 2)
    for (int i = 0; i < w; i++) s[i] += s[i + w];
  return s[0];
#endif
}

JAXEXT_INLINE float reduce_max(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float s[kLanes];
  store(s, x);
  for (int i = 1; i < kLanes; i++) s[0] = s[i] > s[0] || s[i] != s[i] ? s[i] : s[0];
  return s[0];
#endif
}

// The first n lanes (0 <= n <= kLanes); the rest read as `rest` and are not stored.
JAXEXT_INLINE vf load_first(const float* p, int64_t n, float rest = 0.f) {
#if defined(__AVX512F__)
  touch(p, n * sizeof *p);
  return (vf)_mm512_mask_loadu_ps(_mm512_set1_ps(rest), (__mmask16)((1u << n) - 1), p);
#else
  float t[kLanes];
  for (int i = 0; i < kLanes; i++) t[i] = i < n ? p[i] : rest;
  return load(t);
#endif
}
JAXEXT_INLINE void store_first(float* p, vf x, int64_t n) {
#if defined(__AVX512F__)
  touch(p, n * sizeof *p);
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x);
#else
  float t[kLanes];
  store(t, x);
  for (int i = 0; i < n; i++) p[i] = t[i];
#endif
}

// By intrinsics: GCC 12 splits the same conversion, written with vector extensions, into halves.
JAXEXT_INLINE vf widen(vh x) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16);
#else
  return (vf)(__builtin_convertvector(x, vu) << 16);
#endif
}

// Round to nearest even; NaN stays NaN.
JAXEXT_INLINE vh narrow(vf x) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  vu u = (vu)x;
  vu r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu quiet = (u >> 16) | 0x40u;
  r = (x != x) ? quiet : r;
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)r);
#elif defined(__AVX2__)
  return (vh)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)r), _mm256_extracti128_si256((__m256i)r, 1));
#else
  return __builtin_convertvector(r, vh);
#endif
#endif
}

JAXEXT_INLINE vf load(const bf16* p) {
  vh x;
  memcpy(&x, p, sizeof x);
  return widen(x);
}
JAXEXT_INLINE void store(bf16* p, vf x) {
  vh y = narrow(x);
  memcpy(p, &y, sizeof y);
}
JAXEXT_INLINE vf load_first(const bf16* p, int64_t n, float rest = 0.f) {
#if defined(__AVX512F__)
  touch(p, n * sizeof *p);
  const __mmask16 some = (__mmask16)((1u << n) - 1);
  return (vf)_mm512_mask_mov_ps(_mm512_set1_ps(rest), some, (__m512)widen((vh)_mm256_maskz_loadu_epi16(some, p)));
#else
  uint32_t fill;
  memcpy(&fill, &rest, 4);
  bf16 t[kLanes];
  for (int i = 0; i < kLanes; i++) t[i] = i < n ? p[i] : (bf16)(fill >> 16);
  return load(t);
#endif
}
JAXEXT_INLINE void store_first(bf16* p, vf x, int64_t n) {
#if defined(__AVX512F__)
  touch(p, n * sizeof *p);
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)narrow(x));
#else
  bf16 t[kLanes];
  store(t, x);
  for (int i = 0; i < n; i++) p[i] = t[i];
#endif
}

JAXEXT_INLINE vf round_nearest(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (vf)_mm_round_ps((__m128)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
}

// 2^(n + f) for a whole n from -151 to 129 and |f| <= 1/2: minimax polynomial of degree 6, and an exponent added to the bits.
JAXEXT_INLINE vf exp2(vf n, vf f) {
  vf p = splat(1.5353362e-4f);
  p = fma(p, f, splat(1.3398874e-3f));
  p = fma(p, f, splat(9.6184373e-3f));
  p = fma(p, f, splat(5.5503324e-2f));
  p = fma(p, f, splat(2.4022648e-1f));
  p = fma(p, f, splat(6.9314720e-1f));
  p = fma(p, f, splat(1.f));
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // Two halves, so that neither factor's exponent leaves the normal range.
  vi k = __builtin_convertvector(n, vi), half = k >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((k - half + 127) << 23);
#endif
}
// 2^x, relative error below 2.5e-7 for |x| < 126; 0 below -150, infinity above 128, NaN for NaN.
JAXEXT_INLINE vf exp2(vf x) {
  vf in = x;
  x = min(splat(129.f), max(splat(-151.f), x));
  vf n = round_nearest(x);
  return select(in != in, in, exp2(n, x - n));
}
JAXEXT_INLINE vf exp(vf x) {
  // x*log2(e) in two parts: the rounding of one product alone costs 1e-5 at x = -80.
  vf y = x * splat(1.44269504f);
  vf low = fma(x, splat(1.44269504f), -y) + x * splat(1.925963e-8f);
  low = select(low == low, low, splat(0.f));
  vf n = round_nearest(min(splat(129.f), max(splat(-151.f), y)));
  vf r = exp2(n) * exp2((y - n) + low);
  vf capped = select(y < splat(-150.f), splat(0.f), select(y > splat(128.f), splat(__builtin_inff()), r));
  return select(x != x, x, capped);
}

}  // namespace jaxext::JAXEXT_ISA
