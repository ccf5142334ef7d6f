// Which element of x lies under a tap of a place, in one dimension, and places in the order a kernel takes them.
#pragma once
#include "convolution.h"
#include "panels.h"

namespace jaxext::JAXEXT_ISA {
namespace {

// Places first + step * q, q < count, that have the same taps over elements; neighbours are `stride` elements apart.
struct Places {
  int64_t first, step, count, stride;
};

// The q in [from, to) whose element lies inside of x.
struct Inside {
  int64_t from, to;
};

struct Dimension {
  int64_t size, places, taps, stride, dilation, base, low;

  // Where elements are apart, places fall into several sets with taps of their own.
  int64_t sets() const {
    int64_t a = base, b = stride;
    while (b) {
      const int64_t rest = a % b;
      a = b, b = rest;
    }
    return base / a;
  }
  Places set(int64_t which) const {
    const int64_t step = sets();
    return {which, step, which < places ? (places - which + step - 1) / step : 0, step * stride / base};
  }
  // The element under tap k of a set's first place, perhaps outside of x; whether there is one.
  bool element(const Places& set, int64_t k, int64_t& found) const {
    const int64_t position = set.first * stride + k * dilation - low;
    found = position / base - (position % base < 0);
    return position % base == 0;
  }
  Inside inside(const Places& set, int64_t element) const {
    const int64_t from = element < 0 ? (-element + set.stride - 1) / set.stride : 0;
    const int64_t to = element < size ? (size - 1 - element) / set.stride + 1 : 0;
    return {least(from, set.count), least(to, set.count)};
  }
};

Dimension rows_of(const ConvolutionArgs& a) {
  return {a.h, a.oh, a.kh, a.stride[0], a.dilation[0], a.base[0], a.low[0]};
}
Dimension columns_of(const ConvolutionArgs& a) {
  return {a.w, a.ow, a.kw, a.stride[1], a.dilation[1], a.base[1], a.low[1]};
}

// A grid's places in order: the columns of a row one after the other, or, in a small grid, the images of a place, which
// share the taps that lie outside.
struct Grid {
  int64_t images, rows, columns;

  bool by_place() const { return columns < 8 && images > columns; }
  int64_t size() const { return images * rows * columns; }

  // f(number - first, image, row, column, count) for runs of places whose column, or image, rises.
  template <class F>
  JAXEXT_INLINE void over(int64_t first, int64_t count, const F& f) const {
    const int64_t inner = by_place() ? images : columns;
    for (int64_t at = first; at < first + count;) {
      const int64_t line = at / inner, from = at % inner, n = least(inner - from, first + count - at);
      by_place() ? f(at - first, from, line / columns, line % columns, n)
                 : f(at - first, line / rows, line % rows, from, n);
      at += n;
    }
  }
};

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
