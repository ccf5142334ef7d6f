// Operands of a product as the register tile reads them: panels of kPanel columns, step after step.
#pragma once
#include "attention_tile.h"
#include "rows.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kDepth = 256;  // words of k packed at a time

template <class X>
JAXEXT_INLINE vf load_or_zero(const X* p, int64_t n) {
  return n >= kLanes ? load(p) : n > 0 ? load_first(p, n) : vf{};
}

// Two rows of floats as one row of words: the first in the lower halves.
JAXEXT_INLINE vf paired(vf low, vf high) {
  vu l = __builtin_convertvector(narrow(low), vu), h = __builtin_convertvector(narrow(high), vu);
  return (vf)(l | (h << 16));
}

// `words` steps of rows of n elements, `stride` apart, to panels [n / width][words][width] with zeros for padding.
template <class Mode, class X>
void pack_steps(const X* from, int64_t stride, int64_t k, int64_t n, int64_t width, float* to) {
  const int64_t steps = words<Mode>(k);
  for (int64_t first = 0; first < n; first += width) {
    for (int64_t s = 0; s < steps; s++, to += width) {
      for (int64_t j = 0; j < width; j += kLanes) {
        const int64_t left = n - first - j;
        if constexpr (Mode::kPaired) {
          const X* row = from + 2 * s * stride + first + j;
          store(to + j, paired(load_or_zero(row, left), 2 * s + 1 < k ? load_or_zero(row + stride, left) : vf{}));
        } else {
          store(to + j, load_or_zero(from + s * stride + first + j, left));
        }
      }
    }
  }
}

// A row of k elements as words.
template <class Mode, class X>
JAXEXT_INLINE void pack_row(const X* from, int64_t k, float* to) {
  if constexpr (Mode::kPaired) {
    bf16* half = reinterpret_cast<bf16*>(to);
    if (k % 2) half[k] = 0;
    over_row(k, [&](int64_t j, auto part, int) __attribute__((always_inline)) { part.put(half + j, part.get(from + j)); });
  } else {
    over_row(k, [&](int64_t j, auto part, int) __attribute__((always_inline)) { part.put(to + j, part.get(from + j)); });
  }
}

// n rows of k elements, `stride` apart, to panels [n / kPanel][words][kPanel]: four rows at a time are turned.
template <class Mode, class X>
void pack_turned(const X* from, int64_t stride, int64_t k, int64_t n, float* to) {
  alignas(64) float rows[4][kDepth];
  const int64_t steps = words<Mode>(k), whole = round_down(steps, 4);
  for (int64_t j = 0; j < round_up(n, kPanel); j += 4) {
    float* panel = to + j / kPanel * kPanel * steps + j % kPanel;
    for (int64_t r = 0; r < 4; r++) {
      if (j + r < n) pack_row<Mode>(from + (j + r) * stride, k, rows[r]);
      else memset(rows[r], 0, steps * sizeof(float));
    }
    for (int64_t s = 0; s < whole; s += 4) {
      __m128 w0 = _mm_load_ps(rows[0] + s), w1 = _mm_load_ps(rows[1] + s);
      __m128 w2 = _mm_load_ps(rows[2] + s), w3 = _mm_load_ps(rows[3] + s);
      _MM_TRANSPOSE4_PS(w0, w1, w2, w3);
      _mm_storeu_ps(panel + s * kPanel, w0);
      _mm_storeu_ps(panel + (s + 1) * kPanel, w1);
      _mm_storeu_ps(panel + (s + 2) * kPanel, w2);
      _mm_storeu_ps(panel + (s + 3) * kPanel, w3);
    }
    for (int64_t s = whole; s < steps; s++)
      for (int64_t r = 0; r < 4; r++) memcpy(panel + s * kPanel + r, rows[r] + s, sizeof(float));
  }
}

// Nearly equal blocks of at most `most`, in units of `unit`.
JAXEXT_INLINE int64_t block_of(int64_t n, int64_t most, int64_t unit) {
  const int64_t blocks = (n + most - 1) / most;
  return round_up((n + blocks - 1) / blocks, unit);
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
