// cumlogsumexp: the logarithm of a running sum of exp(x - pivot). The pivot stays at or at most kSlack below the maximum:
// each time it moves the sum is rounded once more, and one that followed every new maximum would move at each element of
// a rising row, whose sum is as long-lived as it is large.
#pragma once
#include "cpu/cumulative_tasks.h"
#include "cpu/log_onto.h"
#include "cpu/rows.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr float kSlack = 8.f, kLowest = -3.402823466e38f;
constexpr int64_t kRowBlock = 256;   // elements of a row between two looks at its maximum
constexpr int64_t kLogElements = 1 << 13;  // of a task, at least

JAXEXT_INLINE float widened(float x) { return x; }
JAXEXT_INLINE float widened(bf16 x) {
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
JAXEXT_INLINE void put(float* p, float x) { *p = x; }
JAXEXT_INLINE void put(bf16* p, float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  *p = (bf16)(x != x ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// exp(x - pivot), at most exp(kSlack). An infinite pivot is an infinite x's: the difference is none.
JAXEXT_INLINE vf exp_from(vf x, vf pivot) {
  constexpr float kLog2e = 1.44269504f, kLog2eRest = 1.925963e-8f;
  const vf d = max(splat(-105.f), select(x == pivot, vf{}, x - pivot));
  const vf n = round_nearest(d * splat(kLog2e));
  return exp2(n, fma(d, splat(kLog2eRest), fma(d, splat(kLog2e), -n)));
}

// One register of neighbouring columns; `rest` is what rounding took from the sum.
struct Columns {
  vf pivot = splat(kLowest), sum = {}, rest = {};
  JAXEXT_INLINE vf step(vf x) {
    const vi moves = x > pivot + splat(kSlack);
    if (any(moves)) {
      const vf to = select(moves, x, pivot), scale = exp_from(pivot, to);
      sum *= scale;
      rest *= scale;
      pivot = to;
    }
    const vf term = exp_from(x, pivot), total = sum + term, gained = total - sum;
    rest += (sum - (total - gained)) + (term - gained);
    sum = total;
    return log_onto(pivot, sum + rest);
  }
};

template <class T>
void logsumexp_columns(const CumulativeArgs& a, const Parallel& par) {
  parallel_columns(a, par, [&](int64_t begin, int64_t width) {
    const auto* x = static_cast<const T*>(a.x) + begin;
    auto* out = static_cast<T*>(a.out) + begin;
    Columns columns[kColumns / kLanes];
    for (int64_t i = 0; i < a.n; i++) {
      const int64_t at = (a.reverse ? a.n - 1 - i : i) * a.inner;
      over_row(width, [&](int64_t j, auto part, int) __attribute__((always_inline)) {
        part.put(out + at + j, columns[j / kLanes].step(part.get(x + at + j)));
      });
    }
  });
}

// A row: in blocks, of which the exponentials and logarithms are whole registers and only the additions one by one.
struct Row {
  float pivot = kLowest;
  double sum = 0;
  float x[kRowBlock], pivots[kRowBlock], terms[kRowBlock], scales[kRowBlock];

  // The x of a block become its results; its length is a multiple of a register's.
  JAXEXT_INLINE void step(int64_t n) {
    const bool moves = set_pivots(n);
    for (int64_t j = 0; j < n; j += kLanes) store(terms + j, exp_from(load(x + j), load(pivots + j)));
    if (moves)
      for (int64_t i = 0; i < n; i++) terms[i] = (float)(sum = sum * scales[i] + terms[i]);
    else
      for (int64_t i = 0; i < n; i++) terms[i] = (float)(sum += terms[i]);
    for (int64_t j = 0; j < n; j += kLanes) store(x + j, log_onto(load(pivots + j), load(terms + j)));
  }

 private:
  JAXEXT_INLINE bool set_pivots(int64_t n) {
    const vf limit = splat(pivot) + splat(kSlack);
    vi above = {};
    for (int64_t j = 0; j < n; j += kLanes) {
      above |= load(x + j) > limit;
      store(pivots + j, splat(pivot));
    }
    if (!any(above)) return false;
    for (int64_t i = 0; i < n; i++) {
      scales[i] = pivot;
      pivot = x[i] > pivot + kSlack ? x[i] : pivot;
      pivots[i] = pivot;
    }
    for (int64_t j = 0; j < n; j += kLanes) store(scales + j, exp_from(load(scales + j), load(pivots + j)));
    return true;
  }
};

template <class T>
void logsumexp_row(const T* x, T* out, int64_t n, bool reverse) {
  Row row;
  for (int64_t first = 0; first < n; first += kRowBlock) {
    const int64_t count = n - first < kRowBlock ? n - first : kRowBlock, whole = (count + kLanes - 1) / kLanes * kLanes;
    const int64_t step = reverse ? -1 : 1, begin = reverse ? n - 1 - first : first;
    for (int64_t i = 0; i < count; i++) row.x[i] = widened(x[begin + step * i]);
    for (int64_t i = count; i < whole; i++) row.x[i] = -__builtin_inff();
    row.step(whole);
    for (int64_t i = 0; i < count; i++) put(out + begin + step * i, row.x[i]);
  }
}

template <class T>
void logsumexp_of(const CumulativeArgs& a, const Parallel& par) {
  if (a.inner > 1) return logsumexp_columns<T>(a, par);
  parallel_rows(par, a.outer, a.n, kLogElements, [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; r++)
      logsumexp_row(static_cast<const T*>(a.x) + r * a.n, static_cast<T*>(a.out) + r * a.n, a.n, a.reverse);
  });
}

void logsumexp(const CumulativeArgs& a, const Parallel& par) {
  a.type == Element::bf16 ? logsumexp_of<bf16>(a, par) : logsumexp_of<float>(a, par);
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
