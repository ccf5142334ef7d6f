// How running sums, products, extremes and logarithms are divided among threads.
#pragma once
#include "cpu/cumulative.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kSplit = 1 << 16;  // a row this long is cut, so that several threads share it
constexpr int64_t kColumns = 64;     // neighbouring columns of one task

// Whether rows are too few for the threads, and long enough to share.
JAXEXT_INLINE bool threads_share_rows(const CumulativeArgs& a, const Parallel& par) {
  return a.n >= kSplit && a.outer < 2 * par.threads && par.threads > 1;
}

// f(at, width) for every tile of columns: its first element's place, and its columns, kColumns but in the last.
template <class F>
JAXEXT_INLINE void parallel_columns(const CumulativeArgs& a, const Parallel& par, const F& f) {
  const int64_t tiles = (a.inner + kColumns - 1) / kColumns;
  parallel_for(par, a.outer * tiles, [&](int64_t task) {
    const int64_t first = task % tiles * kColumns;
    f(task / tiles * a.n * a.inner + first, a.inner - first < kColumns ? a.inner - first : kColumns);
  });
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
