// A product of few rows with a matrix, as in a step of a recurrent network: the matrix is read once, where it is.
//
// What would be packed is read only once, so that packing costs as much as multiplying. Whichever operand has its rows
// along k gives one number a step to all lanes; the other one's columns fill the lanes.
#pragma once
#include "attention_tile.h"
#include "product.h"
#include "turn.h"

#if defined(__AVX512F__)
namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kMostFewRows = 64;
constexpr int64_t kFewDepth = 256;     // contracted at a time: a panel of the few rows stays in the first-level cache
constexpr int64_t kFewColumns = 512;   // of a task at most
constexpr int64_t kOneThread = 1 << 20;  // multiplications that take less than waking another thread

template <int n>
struct Height {
  static constexpr int value = n;
};

// out[kHeight][kVectors * kLanes] (+)= rows[kHeight][steps] b, where step s of b is at b + s * step.
template <int kHeight, int kVectors, bool kAccumulate>
JAXEXT_NOINLINE void few_tile(const float* rows, int64_t row, const float* b, int64_t step, int64_t steps, float* out,
                              int64_t out_row) {
  vf acc[kHeight][kVectors];
  JAXEXT_UNROLL
  for (int r = 0; r < kHeight; r++) {
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors; v++) acc[r][v] = vf{};
  }
  const float* three[(kHeight + 2) / 3];  // x86 addresses base + {0, 1, 2} * row each
  JAXEXT_UNROLL
  for (int g = 0; g < (kHeight + 2) / 3; g++) three[g] = rows + 3 * g * row;
  int64_t s = 0;
  do {
    vf y[kVectors];
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors; v++) y[v] = load(b + v * kLanes);
    JAXEXT_UNROLL
    for (int r = 0; r < kHeight; r++) {
      const vf x = broadcast(three[r / 3] + (r % 3) * row + s);
      JAXEXT_UNROLL
      for (int v = 0; v < kVectors; v++) acc[r][v] = fma(x, y[v], acc[r][v]);
    }
    b += step;
  } while (++s < steps);
  JAXEXT_UNROLL
  for (int r = 0; r < kHeight; r++) {
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors; v++) {
      float* p = out + r * out_row + v * kLanes;
      store(p, kAccumulate ? load(p) + acc[r][v] : acc[r][v]);
    }
  }
}

// As many rows at a time as the register file holds; 16 are twice 8, not 12 and 4.
template <int kVectors, bool kAccumulate>
void few_tiles(const float* rows, int64_t n, int64_t row, const float* b, int64_t step, int64_t steps, float* out,
               int64_t out_row) {
  while (n > 0) {
    int64_t height = 1;
    const auto tile = [&](auto h) {
      height = h.value;
      few_tile<h.value, kVectors, kAccumulate>(rows, row, b, step, steps, out, out_row);
    };
    if constexpr (kVectors <= 2) {
      if (n >= 12 && n != 16) tile(Height<12>());
      else if (n >= 8) tile(Height<8>());
      else if (n >= 4) tile(Height<4>());
      else tile(Height<1>());
    } else {
      if (n >= 6) tile(Height<6>());
      else if (n >= 4) tile(Height<4>());
      else tile(Height<1>());
    }
    n -= height, rows += height * row, out += height * out_row;
  }
}

template <int kVectors>
void few_tiles(bool adds, const float* rows, int64_t n, int64_t row, const float* b, int64_t step, int64_t steps,
               float* out, int64_t out_row) {
  if (adds) few_tiles<kVectors, true>(rows, n, row, b, step, steps, out, out_row);
  else few_tiles<kVectors, false>(rows, n, row, b, step, steps, out, out_row);
}

// Columns [from, to) of out = a b, b [k, n]: the lanes are columns of b.
void few_rows_plain(const ProductArgs& a, int64_t from, int64_t to) {
  const float *rows = static_cast<const float*>(a.a.data), *b = static_cast<const float*>(a.b.data);
  float* out = static_cast<float*>(a.out);
  for (int64_t p = 0; p < a.k; p += kFewDepth) {
    const int64_t steps = least(kFewDepth, a.k - p);
    int64_t j = from;
    for (; j + 2 * kLanes <= to; j += 2 * kLanes)
      few_tiles<2>(p > 0, rows + p, a.m, a.k, b + p * a.n + j, a.n, steps, out + j, a.n);
    for (; j < to; j += kLanes)
      few_tiles<1>(p > 0, rows + p, a.m, a.k, b + p * a.n + j, a.n, steps, out + j, a.n);
  }
}

// Columns [from, to) of out = a bT, b [n, k]: the lanes are rows of a, and the transpose of the result is made first.
template <int kVectors>
void few_rows_turned(const ProductArgs& a, int64_t from, int64_t to) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const float *rows = static_cast<const float*>(a.a.data), *b = static_cast<const float*>(a.b.data);
  float* panel = static_cast<float*>(thread_arena((kFewDepth + kFewColumns) * kWidth * sizeof(float)));
  float* turned = panel + kFewDepth * kWidth;
  for (int64_t p = 0; p < a.k; p += kFewDepth) {
    const int64_t steps = least(kFewDepth, a.k - p);
    if (a.m < kWidth) memset(panel, 0, steps * kWidth * sizeof(float));
    turn(rows + p, a.m, steps, a.k, panel, kWidth);
    few_tiles<kVectors>(p > 0, b + from * a.k + p, to - from, a.k, panel, kWidth, steps, turned, kWidth);
  }
  float* out = static_cast<float*>(a.out) + from;
  const int64_t n = to - from, whole = round_down(n, 4);
  int64_t i = 0;
  for (; i + 4 <= a.m; i += 4)
    for (int64_t j = 0; j < whole; j += 4) turn_four(turned + j * kWidth + i, kWidth, out + i * a.n + j, a.n);
  for (int64_t r = 0; r < a.m; r++)
    for (int64_t j = r < i ? whole : 0; j < n; j++) out[r * a.n + j] = turned[j * kWidth + r];
}

void few_rows_columns(const ProductArgs& a, int64_t from, int64_t to) {
  if (!a.b.turned) return few_rows_plain(a, from, to);
  if (a.m <= kLanes) return few_rows_turned<1>(a, from, to);
  if (a.m <= 2 * kLanes) return few_rows_turned<2>(a, from, to);
  if (a.m <= 3 * kLanes) return few_rows_turned<3>(a, from, to);
  few_rows_turned<4>(a, from, to);
}

// Whether the product is one of few rows that this file multiplies.
bool has_few_rows(const ProductArgs& a) {
  const bool plain = !a.a.bf16 && !a.b.bf16 && !a.out_bf16 && !a.adds && !a.a.turned;
  return plain && a.batch == 1 && a.m <= kMostFewRows && a.k > 0 && (a.b.turned || a.n % kLanes == 0);
}

void few_rows(const ProductArgs& a, const Parallel& par) {
  const int64_t threads = a.m * a.n * a.k < kOneThread ? 1 : most(1, par.threads);
  const int64_t parts = most(threads, (a.n + kFewColumns - 1) / kFewColumns);
  const int64_t width = round_up((a.n + parts - 1) / parts, 2 * kLanes);
  parallel_for(Parallel{par.pool, static_cast<int>(threads), par.run}, (a.n + width - 1) / width,
               [&](int64_t task) { few_rows_columns(a, task * width, least(a.n, (task + 1) * width)); });
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
#endif
