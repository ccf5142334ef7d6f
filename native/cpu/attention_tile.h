// The register-blocked multiply that all of attention's products run through, and the element formats it reads.
//
// Packed operands are streams of 32-bit words: a float, or (kPaired) two bf16 that one vdpbf16ps multiplies and adds.
#pragma once
#include "../vec.h"

namespace jaxext::JAXEXT_ISA {
namespace {

// Float32: f32 in memory. Widened: bf16 in memory, f32 when packed. Paired: bf16 in both.
struct Float32 {
  typedef float Element;
  static constexpr bool kPaired = false;
  static constexpr int kKeys = 64;
};
struct Widened {
  typedef bf16 Element;
  static constexpr bool kPaired = false;
  static constexpr int kKeys = 64;
};
#if defined(__AVX512BF16__)
struct Paired {
  typedef bf16 Element;
  static constexpr bool kPaired = true;
  static constexpr int kKeys = 128;  // as many bytes a key block as f32
};
#endif

// A tile of kRows x kTileVectors accumulators, its operands and one spare fill the register file. What kRows does not
// divide ends in tiles of kFewRows (64 = 10 * 6 + 4, 128 = 20 * 6 + 2 * 4).
constexpr int kRows = 6;
constexpr int kFewRows = 4;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
constexpr int kPanel = kTileVectors * kLanes;
constexpr int kQueries = 96;  // rows of a query block: a multiple of kRows, even

constexpr int64_t round_down(int64_t n, int64_t to) { return n / to * to; }
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Keys that the forward pass takes at a time: twice as many amortise its changes from one product to the next.
template <class Mode>
constexpr int kForwardKeys = 2 * Mode::kKeys;

// Columns of scores that are treated together: Paired, two vectors become one.
template <class Mode>
constexpr int kColumnStep = Mode::kPaired ? 2 * kLanes : kLanes;

// Words that n contracted elements take.
template <class Mode>
constexpr int64_t words(int64_t n) {
  return Mode::kPaired ? (n + 1) / 2 : n;
}

template <class Mode>
JAXEXT_INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512BF16__)
  if constexpr (Mode::kPaired) return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
  return fma(a, b, c);
}

// Left operand of a product: element (row r, step s) at data[r * row + s * step].
struct Left {
  const float* data;
  int64_t row, step;
};
// Right operand: step s holds a row of words at data[s * step].
struct Right {
  const float* data;
  int64_t step;
};

// A word in every lane, moved as bits: a pair of bf16 is no valid float.
JAXEXT_INLINE vf broadcast(const float* word) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(*word);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(*word);
#else
  return (vf)_mm_set1_ps(*word);
#endif
}

// steps >= 1: a loop that may run zero times costs copies of all accumulators around it.
template <class Mode, int kHeight, int kVectors>
JAXEXT_INLINE void multiply_steps(vf (&acc)[kHeight][kVectors], Left a, Right b, int64_t steps) {
  const float* top = a.data;
  const float* low = a.data + 3 * a.row;  // two pointers: x86 addresses base + {0, 1, 2} * row each
  const float* right = b.data;
  do {
    vf y[kVectors];
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors; v++) y[v] = load(right + v * kLanes);
    JAXEXT_UNROLL
    for (int r = 0; r < kHeight; r++) {
      vf x = broadcast(r < 3 ? top + r * a.row : low + (r - 3) * a.row);
      JAXEXT_UNROLL
      for (int v = 0; v < kVectors; v++) acc[r][v] = multiply_add<Mode>(x, y[v], acc[r][v]);
    }
    top += a.step;
    low += a.step;
    right += b.step;
  } while (--steps);
}

// out[kHeight][kVectors * kLanes] (+)= a b, the product summed by itself first: long sums in blocks round less. Out of
// line, so that nothing of the caller's competes for registers.
template <class Mode, int kHeight, int kVectors, bool kAccumulate>
JAXEXT_NOINLINE void multiply_tile(float* out, int64_t out_row, Left a, Right b, int64_t steps) {
  vf acc[kHeight][kVectors];
  JAXEXT_UNROLL
  for (int r = 0; r < kHeight; r++) {
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors; v++) acc[r][v] = vf{};
  }
  multiply_steps<Mode, kHeight, kVectors>(acc, a, b, steps);
  JAXEXT_UNROLL
  for (int r = 0; r < kHeight; r++) {
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors; v++) {
      float* p = out + r * out_row + v * kLanes;
      store(p, kAccumulate ? load(p) + acc[r][v] : acc[r][v]);
    }
  }
}

template <class Mode, int kHeight, bool kAccumulate>
JAXEXT_INLINE void multiply_narrow(int vectors, float* out, int64_t out_row, Left a, Right b, int64_t steps) {
  if (vectors == 1) return multiply_tile<Mode, kHeight, 1, kAccumulate>(out, out_row, a, b, steps);
  if (vectors == 2) return multiply_tile<Mode, kHeight, 2, kAccumulate>(out, out_row, a, b, steps);
#if defined(__AVX512F__)
  if (vectors == 3) return multiply_tile<Mode, kHeight, 3, kAccumulate>(out, out_row, a, b, steps);
  multiply_tile<Mode, kHeight, 4, kAccumulate>(out, out_row, a, b, steps);
#endif
}

// out[kHeight][width] (+)= a b, width a multiple of kLanes, in tiles of nearly equal width.
template <class Mode, int kHeight = kRows, bool kAccumulate = true>
void wide_product(float* out, int64_t out_row, Left a, Right b, int64_t steps, int64_t width) {
  int64_t vectors = width / kLanes;
  for (int64_t tiles = (vectors + kTileVectors - 1) / kTileVectors; tiles > 0; tiles--) {
    int64_t n = (vectors + tiles - 1) / tiles;
    multiply_narrow<Mode, kHeight, kAccumulate>(static_cast<int>(n), out, out_row, a, b, steps);
    vectors -= n;
    out += n * kLanes;
    b.data += n * kLanes;
  }
}

// out[kRows][first, last) = a times panels of kPanel columns each; first and last are multiples of kLanes.
template <class Mode>
void panel_product(float* out, int64_t out_row, Left a, const float* panels, int64_t steps, int64_t first,
                          int64_t last) {
  for (int64_t c = first; c < last;) {
    int64_t inside = c % kPanel;
    int64_t n = least(kPanel - inside, last - c);
    Right b{panels + (c - inside) * steps + inside, kPanel};
    multiply_narrow<Mode, kRows, false>(static_cast<int>(n / kLanes), out + c, out_row, a, b, steps);
    c += n;
  }
}

// 2^x for x <= 128, degree-d minimax polynomial of the fraction; relative error 1.5e-7 (f32) and 2.7e-6 (Paired, whose
// results are rounded to 8 bits). 0 for -inf, NaN for NaN.
template <class Mode>
JAXEXT_INLINE vf exp2_fast(vf x) {
#if defined(__AVX512F__)
  vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
#if defined(__AVX2__)
  x = (vf)_mm256_max_ps((__m256)splat(-127.f), (__m256)x);  // NaN is kept: it is the second operand
  vf n = (vf)_mm256_floor_ps((__m256)x);
#else
  x = (vf)_mm_max_ps((__m128)splat(-127.f), (__m128)x);
  vf n = (vf)_mm_floor_ps((__m128)x);
#endif
  vf f = x - n;
#endif
  vf p;
  if constexpr (Mode::kPaired) {
    p = fma(splat(1.3534168e-2f), f, splat(5.2011460e-2f));
    p = fma(p, f, splat(2.4144275e-1f));
    p = fma(p, f, splat(6.9300383e-1f));
    p = fma(p, f, splat(1.0000026e0f));
  } else {
    p = fma(splat(1.8775767e-3f), f, splat(8.9893397e-3f));
    p = fma(p, f, splat(5.5826318e-2f));
    p = fma(p, f, splat(2.4015361e-1f));
    p = fma(p, f, splat(6.9315308e-1f));
    p = fma(p, f, splat(9.9999994e-1f));
  }
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  return p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
#endif
}

// log2 of a normal number, absolute error 1e-7; infinity and NaN stay. The series of artanh((m - 1) / (m + 1)).
JAXEXT_INLINE vf log2_fast(vf x) {
  vi e = ((vi)x - 0x3f3504f3) >> 23;  // of m in [sqrt(1/2), sqrt(2))
  vf m = (vf)((vi)x - (e << 23));
  vf t = (m - splat(1.f)) / (m + splat(1.f)), y = t * t;
  vf p = fma(splat(0.320598898f), y, splat(0.412198583f));
  p = fma(p, y, splat(0.577078016f));
  p = fma(p, y, splat(0.961796694f));
  p = fma(p, y, splat(2.88539008f));
  vf log = fma(p, t, __builtin_convertvector(e, vf));
  return select(x < splat(__builtin_inff()), log, x);
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
