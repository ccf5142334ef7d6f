// A product a'b of two tall matrices of few columns, as the gradient of a narrow layer's weights: a long sum of small
// outer products.
//
// The result has too few blocks to go round the threads, so that the sum is divided; how, depends on the sizes alone.
// Both operands are read once from memory, in pieces that stay in the first-level cache, and nothing is packed.
#pragma once
#include "attention_tile.h"
#include "product.h"
#include "rows.h"

#if defined(__AVX512F__)
namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kMostFewColumns = 128, kLeastSteps = 256;
constexpr int64_t kPieceFloats = 8192;              // of both operands: 32 KiB
constexpr int64_t kPartSteps = 512, kMostParts = 16;  // of the sum; each part has a result of its own
constexpr int64_t kOuterOneThread = 1 << 20;          // multiplications that take less than waking another thread

template <int n>
struct Rows {
  static constexpr int value = n;
};

// wide[steps][], narrow[steps][]: one piece of the sum.
struct Outer {
  const float *wide, *narrow;
  int64_t wide_row, narrow_row, steps;
};

// out[kHeight][kVectors registers, the last one a part] (+)= the sum over steps of narrow[s][r] wide[s][lane].
template <int kHeight, int kVectors, class Last>
JAXEXT_NOINLINE void outer_tile(Outer of, Last last, bool adds, float* out, int64_t out_row) {
  vf acc[kHeight][kVectors];
  JAXEXT_UNROLL
  for (int r = 0; r < kHeight; r++) {
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors; v++) acc[r][v] = vf{};
  }
  const float *wide = of.wide, *narrow = of.narrow;
  for (int64_t s = 0; s < of.steps; s++, wide += of.wide_row, narrow += of.narrow_row) {
    vf y[kVectors];
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors - 1; v++) y[v] = load(wide + v * kLanes);
    y[kVectors - 1] = last.get(wide + (kVectors - 1) * kLanes);
    JAXEXT_UNROLL
    for (int r = 0; r < kHeight; r++) {
      const vf x = broadcast(narrow + r);
      JAXEXT_UNROLL
      for (int v = 0; v < kVectors; v++) acc[r][v] = fma(x, y[v], acc[r][v]);
    }
  }
  JAXEXT_UNROLL
  for (int r = 0; r < kHeight; r++) {
    float* p = out + r * out_row;
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors - 1; v++, p += kLanes) store(p, adds ? load(p) + acc[r][v] : acc[r][v]);
    last.put(p, adds ? last.get(p) + acc[r][kVectors - 1] : acc[r][kVectors - 1]);
  }
}

// As many rows at a time as the register file holds.
template <int kVectors, class Last>
void outer_rows(Outer of, Last last, int64_t rows, bool adds, float* out, int64_t out_row) {
  while (rows > 0) {
    int64_t height = 1;
    const auto tile = [&](auto h) {
      height = h.value;
      outer_tile<h.value, kVectors>(of, last, adds, out, out_row);
    };
    if constexpr (kVectors <= 2) {
      if (rows >= 12 && rows != 16) tile(Rows<12>());
      else if (rows >= 8) tile(Rows<8>());
      else if (rows >= 4) tile(Rows<4>());
      else tile(Rows<1>());
    } else {
      if (rows >= 4) tile(Rows<4>());
      else if (rows >= 2) tile(Rows<2>());
      else tile(Rows<1>());
    }
    rows -= height, of.narrow += height, out += height * out_row;
  }
}

// out[narrow][wide] (+)= one piece.
void outer_piece(Outer of, int64_t narrow, int64_t wide, bool adds, float* out) {
  int64_t j = 0;
  const auto at = [&](int64_t first) { return Outer{of.wide + first, of.narrow, of.wide_row, of.narrow_row, of.steps}; };
  if (narrow <= 4)
    for (; j + 4 * kLanes <= wide; j += 4 * kLanes) outer_rows<4>(at(j), Full{}, narrow, adds, out + j, wide);
  for (; j + 2 * kLanes <= wide; j += 2 * kLanes) outer_rows<2>(at(j), Full{}, narrow, adds, out + j, wide);
  for (; j + kLanes <= wide; j += kLanes) outer_rows<1>(at(j), Full{}, narrow, adds, out + j, wide);
  if (j < wide) outer_rows<1>(at(j), First{wide - j}, narrow, adds, out + j, wide);
}

// Whether the product is one of few columns that this file multiplies.
bool has_few_columns(const ProductArgs& a) {
  const bool plain = !a.a.bf16 && !a.b.bf16 && !a.out_bf16 && !a.adds && a.a.turned && !a.b.turned;
  return plain && a.batch == 1 && a.k >= kLeastSteps && most(a.m, a.n) <= kMostFewColumns;
}

void few_columns(const ProductArgs& a, const Parallel& par) {
  const bool swaps = a.m > a.n;
  const int64_t narrow = swaps ? a.n : a.m, wide = swaps ? a.m : a.n, size = narrow * wide;
  const float *left = static_cast<const float*>(a.a.data), *right = static_cast<const float*>(a.b.data);
  const float *few = swaps ? right : left, *many = swaps ? left : right;
  const int64_t parts = least(kMostParts, (a.k + kPartSteps - 1) / kPartSteps), steps = (a.k + parts - 1) / parts;
  const int64_t depth = most(32, kPieceFloats / (narrow + wide));
  float* sums = static_cast<float*>(thread_arena(parts * size * sizeof(float)));
  const int threads = size * a.k < kOuterOneThread ? 1 : par.threads;
  parallel_for(Parallel{par.pool, threads, par.run}, parts, [&](int64_t part) {
    const int64_t from = part * steps, to = least(a.k, from + steps);
    float* out = sums + part * size;
    if (from >= to) memset(out, 0, size * sizeof(float));
    for (int64_t s = from; s < to; s += depth)
      outer_piece({many + s * wide, few + s * narrow, wide, narrow, least(depth, to - s)}, narrow, wide, s > from, out);
  });
  for (int64_t part = 1; part < parts; part++) {
    over_row(size, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
      lanes.put(sums + j, lanes.get(sums + j) + lanes.get(sums + part * size + j));
    });
  }
  float* out = static_cast<float*>(a.out);
  if (!swaps) memcpy(out, sums, size * sizeof(float));
  else
    for (int64_t i = 0; i < a.m; i++)
      for (int64_t j = 0; j < a.n; j++) out[i * a.n + j] = sums[j * a.m + i];
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
#endif
