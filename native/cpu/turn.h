// The transpose of a small matrix of floats, four by four.
#pragma once
#include <immintrin.h>

#include "../isa.h"

namespace jaxext::JAXEXT_ISA {
namespace {

// Four rows of four floats, `row` apart, to four rows of the transpose, `to_row` apart.
JAXEXT_INLINE void turn_four(const float* from, int64_t row, float* to, int64_t to_row) {
  __m128 w0 = _mm_loadu_ps(from), w1 = _mm_loadu_ps(from + row);
  __m128 w2 = _mm_loadu_ps(from + 2 * row), w3 = _mm_loadu_ps(from + 3 * row);
  _MM_TRANSPOSE4_PS(w0, w1, w2, w3);
  _mm_storeu_ps(to, w0);
  _mm_storeu_ps(to + to_row, w1);
  _mm_storeu_ps(to + 2 * to_row, w2);
  _mm_storeu_ps(to + 3 * to_row, w3);
}

// to [n, width] = the transpose of from [m, n], `row` apart; columns from m on are left as they are.
void turn(const float* from, int64_t m, int64_t n, int64_t row, float* to, int64_t width) {
  if (m < 4 || n < 4) {
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) to[j * width + i] = from[i * row + j];
    return;
  }
  // The last four of either overlap those before, so that no single ones are left over.
  for (int64_t r = 0; r < m; r += 4) {
    const int64_t i = r + 4 <= m ? r : m - 4;
    for (int64_t c = 0; c < n; c += 4) {
      const int64_t j = c + 4 <= n ? c : n - 4;
      turn_four(from + i * row + j, row, to + j * width + i, width);
    }
  }
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
