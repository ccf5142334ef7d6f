// Copies of attention's operands in the orders that the tiles of attention_tile.h read.
#pragma once
#include "attention.h"
#include "attention_tile.h"

namespace jaxext::JAXEXT_ISA {
namespace {

template <class Mode>
typename Mode::Element* row_of(const AttentionOperand& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<typename Mode::Element*>(x.data) + batch * x.batch + head * x.head + row * x.row;
}

// The first n of kLanes elements, n possibly beyond kLanes.
template <class Element>
JAXEXT_INLINE vf load_part(const Element* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, n);
}
template <class Element>
JAXEXT_INLINE void store_part(Element* p, vf x, int64_t n) {
  n >= kLanes ? store(p, x) : store_first(p, x, n);
}

// Words [word, word + kLanes) of a row of `depth` elements, zero behind its end.
template <class Mode>
JAXEXT_INLINE vf load_row_words(const typename Mode::Element* row, int64_t word, int64_t depth) {
  constexpr int kPer = Mode::kPaired ? 2 : 1;
  int64_t left = depth - word * kPer;
  if constexpr (Mode::kPaired) {
    const float* bits = reinterpret_cast<const float*>(row + word * kPer);
    if (left >= kLanes * kPer) return load(bits);
    float rest[kLanes] = {};
    if (left > 0) memcpy(rest, bits, left * sizeof(*row));
    return load(rest);
  } else {
    return left > 0 ? load_part(row + word, left) : vf{};
  }
}

// Rows of a head lie far apart, where no hardware prefetcher follows: asks for the next few.
template <class Element>
JAXEXT_INLINE void prefetch_rows(const Element* in, int64_t stride, int64_t rows, int64_t depth) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t c = 0; c < depth; c += 64 / static_cast<int64_t>(sizeof(Element)))
      __builtin_prefetch(in + i * stride + c);
}

// out[rows][width] words: rows as they are, times `scale` (not Paired, whose elements stay exact), zero padded.
template <class Mode>
void pack_rows(const typename Mode::Element* in, int64_t stride, int64_t rows, int64_t depth, float scale,
                      float* out, int64_t width) {
  constexpr int64_t kAhead = 16;
  for (int64_t i = 0; i < rows; i++) {
    prefetch_rows(in + (i + kAhead) * stride, stride, least(rows - i - kAhead, 1), depth);
    for (int64_t w = 0; w < width; w += kLanes) {
      vf x = load_row_words<Mode>(in + i * stride, w, depth);
      if constexpr (!Mode::kPaired) x = x * splat(scale);
      store(out + i * width + w, x);
    }
  }
}

JAXEXT_INLINE vf interleave_low(vf a, vf b) {
  vi order;
  for (int i = 0; i < kLanes; i++) order[i] = i / 2 + (i % 2) * kLanes;
  return __builtin_shuffle(a, b, order);
}
JAXEXT_INLINE vf interleave_high(vf a, vf b) {
  vi order;
  for (int i = 0; i < kLanes; i++) order[i] = i / 2 + (i % 2) * kLanes + kLanes / 2;
  return __builtin_shuffle(a, b, order);
}

// log2(kLanes) perfect shuffles of the registers are a transposition.
JAXEXT_INLINE void transpose(vf (&x)[kLanes]) {
  for (int step = 1; step < kLanes; step *= 2) {
    vf y[kLanes];
    JAXEXT_UNROLL
    for (int i = 0; i < kLanes / 2; i++) {
      y[2 * i] = interleave_low(x[i], x[i + kLanes / 2]);
      y[2 * i + 1] = interleave_high(x[i], x[i + kLanes / 2]);
    }
    JAXEXT_UNROLL
    for (int i = 0; i < kLanes; i++) x[i] = y[i];
  }
}

// Transposed into panels out[keys / kPanel][words(depth)][kPanel]; `keys` a multiple of kLanes, zero from `valid` on.
template <class Mode>
void pack_panels(const typename Mode::Element* in, int64_t stride, int64_t valid, int64_t keys, int64_t depth,
                        float* out) {
  int64_t steps = words<Mode>(depth);
  for (int64_t j = 0; j < keys; j += kLanes) {
    float* panel = out + j / kPanel * kPanel * steps + j % kPanel;
    prefetch_rows(in + (j + kLanes) * stride, stride, least(valid - j - kLanes, kLanes), depth);
    for (int64_t w = 0; w < steps; w += kLanes) {
      vf x[kLanes];
      for (int i = 0; i < kLanes; i++)
        x[i] = j + i < valid ? load_row_words<Mode>(in + (j + i) * stride, w, depth) : vf{};
      transpose(x);
      for (int i = 0; i < kLanes && w + i < steps; i++) store(panel + (w + i) * kPanel, x[i]);
    }
  }
}

JAXEXT_INLINE vu load_halves(const bf16* row, int64_t column, int64_t depth) {
  vh x{};
  if (depth - column >= kLanes)
    memcpy(&x, row + column, sizeof x);
  else if (depth > column)
    memcpy(&x, row + column, (depth - column) * sizeof *row);
  return __builtin_convertvector(x, vu);
}

// Right operand contracted over rows: out[words(rows)][width]; Paired holds rows 2i and 2i + 1 in one word. `rows` is
// even, zero from `valid` on.
template <class Mode>
void pack_right(const typename Mode::Element* in, int64_t stride, int64_t valid, int64_t rows, int64_t depth,
                       float* out, int64_t width) {
  if constexpr (Mode::kPaired) {
    constexpr int64_t kAhead = 16;
    for (int64_t i = 0; i < rows; i += 2) {
      prefetch_rows(in + (i + kAhead) * stride, stride, least(valid - i - kAhead, 2), depth);
      for (int64_t c = 0; c < width; c += kLanes) {
        vu even = i < valid ? load_halves(in + i * stride, c, depth) : vu{};
        vu odd = i + 1 < valid ? load_halves(in + (i + 1) * stride, c, depth) : vu{};
        store(out + i / 2 * width + c, (vf)(even | odd << 16));
      }
    }
  } else {
    pack_rows<Mode>(in, stride, valid, depth, 1.f, out, width);
    for (int64_t i = valid * width; i < rows * width; i += kLanes) store(out + i, vf{});
  }
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
