// Many small products, as of the pairs of features in each example: each one from the first-level cache.
//
// The rows on the left are read where they are, either way round; on the right, what is no row of whole registers is
// copied to one. Tiles are of nearly equal height: three rows, one by one, wait for their sums as long as twelve take.
#pragma once
#include "attention_tile.h"
#include "product.h"
#include "turn.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kMostSmall = 128;             // rows and steps
constexpr int64_t kMostSmallColumns = 64;
constexpr int64_t kSmallOneThread = 1 << 19;    // multiplications that take less than waking another thread

// Accumulators, a row of b and a broadcast fill the register file.
#if defined(__AVX512F__)
template <int kVectors>
constexpr int kSmallHeight = kVectors <= 2 ? 12 : 6;
#else
template <int kVectors>
constexpr int kSmallHeight = kVectors == 1 ? 8 : 6;
#endif

// out[kHeight][(kVectors - 1) * kLanes + last] = a b.
template <int kHeight, int kVectors>
JAXEXT_NOINLINE void small_tile(Left a, Right b, int64_t steps, float* out, int64_t out_row, int64_t last) {
  vf acc[kHeight][kVectors];
  JAXEXT_UNROLL
  for (int r = 0; r < kHeight; r++) {
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors; v++) acc[r][v] = vf{};
  }
  const float* three[(kHeight + 2) / 3];  // x86 addresses base + {0, 1, 2} * row each
  JAXEXT_UNROLL
  for (int g = 0; g < (kHeight + 2) / 3; g++) three[g] = a.data + 3 * g * a.row;
  do {
    vf y[kVectors];
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors; v++) y[v] = load(b.data + v * kLanes);
    JAXEXT_UNROLL
    for (int r = 0; r < kHeight; r++) {
      const vf x = broadcast(three[r / 3] + (r % 3) * a.row);
      JAXEXT_UNROLL
      for (int v = 0; v < kVectors; v++) acc[r][v] = fma(x, y[v], acc[r][v]);
    }
    JAXEXT_UNROLL
    for (int g = 0; g < (kHeight + 2) / 3; g++) three[g] += a.step;
    b.data += b.step;
  } while (--steps);
  JAXEXT_UNROLL
  for (int r = 0; r < kHeight; r++) {
    float* p = out + r * out_row;
    JAXEXT_UNROLL
    for (int v = 0; v + 1 < kVectors; v++) store(p + v * kLanes, acc[r][v]);
    if (last == kLanes) store(p + (kVectors - 1) * kLanes, acc[r][kVectors - 1]);
    else store_first(p + (kVectors - 1) * kLanes, acc[r][kVectors - 1], last);
  }
}

template <int kHeight, int kVectors>
JAXEXT_INLINE void small_tile_of(int64_t height, Left a, Right b, int64_t steps, float* out, int64_t out_row,
                                 int64_t last) {
  if (height == kHeight) return small_tile<kHeight, kVectors>(a, b, steps, out, out_row, last);
  if constexpr (kHeight > 1) small_tile_of<kHeight - 1, kVectors>(height, a, b, steps, out, out_row, last);
}

template <int kVectors>
JAXEXT_INLINE void small_rows(Left a, Right b, int64_t m, int64_t steps, float* out, int64_t out_row, int64_t last) {
  constexpr int64_t kMost = kSmallHeight<kVectors>;
  for (int64_t tiles = (m + kMost - 1) / kMost; tiles > 0; tiles--) {
    const int64_t height = (m + tiles - 1) / tiles;
    small_tile_of<kMost, kVectors>(height, a, b, steps, out, out_row, last);
    m -= height, a.data += height * a.row, out += height * out_row;
  }
}

void small_product(const ProductArgs& a, const float* left, const float* right, float* out, float* room) {
  const int64_t width = round_up(a.n, kLanes);
  Right b{right, a.n};
  if (a.b.turned) turn(right, a.n, a.k, a.k, room, width);
  else if (width != a.n)
    for (int64_t s = 0; s < a.k; s++)
      for (int64_t j = 0; j < a.n; j += kLanes)
        store(room + s * width + j, load_first(right + s * a.n + j, least(kLanes, a.n - j)));
  if (a.b.turned || width != a.n) b = {room, width};
  const Left rows{left, a.a.turned ? 1 : a.k, a.a.turned ? a.m : 1};
  for (int64_t j = 0; j < a.n; j += kPanel, b.data += kPanel, out += kPanel) {
    const int64_t columns = least(kPanel, a.n - j), last = (columns - 1) % kLanes + 1;
    if (columns <= kLanes) small_rows<1>(rows, b, a.m, a.k, out, a.n, last);
    else if (columns <= 2 * kLanes) small_rows<2>(rows, b, a.m, a.k, out, a.n, last);
#if defined(__AVX512F__)
    else if (columns <= 3 * kLanes) small_rows<3>(rows, b, a.m, a.k, out, a.n, last);
    else small_rows<4>(rows, b, a.m, a.k, out, a.n, last);
#endif
  }
}

// Whether the products are those that this file multiplies.
bool are_small(const ProductArgs& a) {
  const bool plain = !a.a.bf16 && !a.b.bf16 && !a.out_bf16 && !a.adds;
  return plain && a.batch > 1 && a.m <= kMostSmall && a.n <= kMostSmallColumns && a.k > 0 && a.k <= kMostSmall;
}

void small_products(const ProductArgs& a, const Parallel& par) {
  const int64_t work = a.m * a.n * a.k, threads = a.batch * work < kSmallOneThread ? 1 : most(1, par.threads);
  const int64_t each = threads == 1 ? a.batch : most(1, a.batch / (4 * threads));
  const auto *left = static_cast<const float*>(a.a.data), *right = static_cast<const float*>(a.b.data);
  float* out = static_cast<float*>(a.out);
  parallel_for(par, (a.batch + each - 1) / each, [&](int64_t task) {
    float* room = static_cast<float*>(thread_arena(kMostSmall * kMostSmallColumns * sizeof(float)));
    if (a.b.turned) memset(room, 0, a.k * round_up(a.n, kLanes) * sizeof(float));  // what pads the rows stays
    for (int64_t i = task * each; i < least(a.batch, (task + 1) * each); i++)
      small_product(a, left + i * a.m * a.k, right + i * a.k * a.n, out + i * a.m * a.n, room);
  });
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
