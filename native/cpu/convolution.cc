// Convolution as a product whose left rows are read where they lie in x ("indirect convolution", Dukhan 2019): a table
// holds, for each tap and place, the address of the channels under it, or of zeros outside of x. No patches are copied,
// nothing is padded, and strides, dilations and elements apart differ in the table alone.
#include "convolution.h"

#ifdef JAXEXT_KERNEL
#include "convolution_places.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kPlacesAtOnce = 264, kFeaturesAtOnce = 256;  // of a task's block of the result
constexpr int64_t kLeastPlaces = 48;                           // of a block, where there would be fewer than threads
constexpr int64_t kMostTaps = 64;                              // in a table
constexpr int64_t kSummed = 128;  // products that are summed before they are added to the rest: long sums round more
constexpr int64_t kSerialProducts = 1 << 18;                   // below, the calling thread does all

alignas(64) const float kZeros[kSummed] = {};

// out[r][0, width) (+)= the sums over taps and steps of rows[tap][r][step] panel[tap][step].
template <int kVectors>
JAXEXT_NOINLINE void table_tile(const float* const* rows, int64_t apart, int64_t taps, int64_t steps, const float* panel,
                                float* const* out, int64_t width, bool adds) {
  vf acc[kRows][kVectors];
  JAXEXT_UNROLL
  for (int r = 0; r < kRows; r++) {
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors; v++) acc[r][v] = vf{};
  }
  for (int64_t t = 0; t < taps; t++, rows += apart, panel += steps * kPanel) {
    const float* x[kRows];
    bool any = false;
    JAXEXT_UNROLL
    for (int r = 0; r < kRows; r++) x[r] = rows[r], any |= rows[r] != kZeros;
    if (!any) continue;
    const float* right = panel;
    int64_t k = 0;
    do {
      vf y[kVectors];
      JAXEXT_UNROLL
      for (int v = 0; v < kVectors; v++) y[v] = load(right + v * kLanes);
      JAXEXT_UNROLL
      for (int r = 0; r < kRows; r++) {
        const vf left = broadcast(x[r] + k);
        JAXEXT_UNROLL
        for (int v = 0; v < kVectors; v++) acc[r][v] = fma(left, y[v], acc[r][v]);
      }
      right += kPanel;
    } while (++k < steps);
  }
  JAXEXT_UNROLL
  for (int r = 0; r < kRows; r++) {
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors; v++) {
      float* p = out[r] + v * kLanes;
      const int64_t n = least(kLanes, width - v * kLanes);
      store_first(p, adds ? load_first(p, n) + acc[r][v] : acc[r][v], n);
    }
  }
}

// One place of the result and the element of x under one of its taps.
struct Pair {
  const float *x, *cotangent;
};

// out[kHeight][0, width) += the sums over pairs of x[channel + r] cotangent.
template <int kHeight, int kVectors>
JAXEXT_NOINLINE void pairs_tile(const Pair* pairs, int64_t count, int64_t channel, float* out, int64_t out_row,
                                int64_t width) {
  vf acc[kHeight][kVectors];
  JAXEXT_UNROLL
  for (int r = 0; r < kHeight; r++) {
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors; v++) acc[r][v] = vf{};
  }
  do {
    const float *x = pairs->x + channel, *right = pairs->cotangent;
    vf y[kVectors];
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors; v++) y[v] = load(right + v * kLanes);
    JAXEXT_UNROLL
    for (int r = 0; r < kHeight; r++) {
      const vf left = broadcast(x + r);
      JAXEXT_UNROLL
      for (int v = 0; v < kVectors; v++) acc[r][v] = fma(left, y[v], acc[r][v]);
    }
    pairs++;
  } while (--count);
  JAXEXT_UNROLL
  for (int r = 0; r < kHeight; r++) {
    JAXEXT_UNROLL
    for (int v = 0; v < kVectors; v++) {
      float* p = out + r * out_row + v * kLanes;
      const int64_t n = least(kLanes, width - v * kLanes);
      store_first(p, load_first(p, n) + acc[r][v], n);
    }
  }
}

template <int kVectors>
void pairs_tile(int64_t height, const Pair* pairs, int64_t count, int64_t channel, float* out, int64_t out_row,
                int64_t width) {
  switch (height) {
    case 1: return pairs_tile<1, kVectors>(pairs, count, channel, out, out_row, width);
    case 2: return pairs_tile<2, kVectors>(pairs, count, channel, out, out_row, width);
    case 3: return pairs_tile<3, kVectors>(pairs, count, channel, out, out_row, width);
    case 4: return pairs_tile<4, kVectors>(pairs, count, channel, out, out_row, width);
    case 5: return pairs_tile<5, kVectors>(pairs, count, channel, out, out_row, width);
    default: return pairs_tile<6, kVectors>(pairs, count, channel, out, out_row, width);
  }
}

// f(the number of registers that `width` columns of a panel take, as a type).
template <int kVectors>
struct Vectors {
  static constexpr int value = kVectors;
};
template <class F>
JAXEXT_INLINE void with_vectors(int64_t width, const F& f) {
  const int64_t vectors = (width + kLanes - 1) / kLanes;
  if (vectors == 1) return f(Vectors<1>{});
#if defined(__AVX512F__)
  if (vectors == 2) return f(Vectors<2>{});
  if (vectors == 3) return f(Vectors<3>{});
#endif
  f(Vectors<kTileVectors>{});
}

// A block of the result: places of one set of rows and one of columns, and some features.
struct Block {
  Places down, across;
  Grid grid;
  int64_t first, count, feature, features;
};

// The taps that a set of places has, as numbers of the kernel's rows and the elements under the first place.
struct Taps {
  int64_t count = 0, which[kMostTaps], element[kMostTaps];

  Taps(const Dimension& line, const Places& set) {
    for (int64_t k = 0; k < line.taps; k++) {
      which[count] = k;
      count += line.element(set, k, element[count]);
    }
  }
};

// table[i] = where the channels under a tap of the block's place i are, the tap's element being (row, column).
void fill_table(const ConvolutionArgs& a, const Block& b, int64_t row, int64_t column, int64_t channel,
                const float** table) {
  const Dimension rows = rows_of(a), columns = columns_of(a);
  const Inside down = rows.inside(b.down, row), across = columns.inside(b.across, column);
  auto at = [&](int64_t image, int64_t r, int64_t c) {
    return a.x + ((image * a.h + r * b.down.stride + row) * a.w + c * b.across.stride + column) * a.c + channel;
  };
  b.grid.over(b.first, b.count, [&](int64_t i, int64_t image, int64_t r, int64_t c, int64_t n) {
    int64_t from = 0, to = r >= down.from && r < down.to ? n : 0;
    const bool by_place = b.grid.by_place();
    if (by_place) {
      if (c < across.from || c >= across.to) to = 0;
    } else {
      from = least(most(across.from - c, 0), to), to = most(least(across.to - c, to), from);
    }
    for (int64_t j = 0; j < from; j++) table[i + j] = kZeros;
    const float* p = by_place ? at(image, r, c) : at(image, r, c + from);
    const int64_t step = by_place ? a.h * a.w * a.c : b.across.stride * a.c;
    for (int64_t j = from; j < to; j++, p += step) table[i + j] = p;
    for (int64_t j = to; j < n; j++) table[i + j] = kZeros;
  });
  for (int64_t j = b.count; j < round_up(b.count, kRows); j++) table[j] = kZeros;
}

// The kernel's channels [channel, channel + steps) and features [feature, feature + width) under a tap, as a panel.
void pack_tap(const ConvolutionArgs& a, int64_t tap, int64_t channel, int64_t steps, int64_t feature, int64_t width,
              float* panel) {
  const float* kernel = a.other + (a.reversed ? a.kh * a.kw - 1 - tap : tap) * a.c * a.f;
  if (a.turned) pack_turned<Float32>(kernel + feature * a.c + channel, a.c, steps, width, panel);
  else pack_steps<Float32>(kernel + channel * a.f + feature, a.f, steps, width, kPanel, panel);
}

// Where the block's places are in the result; `spare` for those that fill the last tile.
void fill_places(const ConvolutionArgs& a, const Block& b, float* spare, float** out) {
  b.grid.over(b.first, b.count, [&](int64_t i, int64_t image, int64_t r, int64_t c, int64_t n) {
    const int64_t row = b.down.first + r * b.down.step, column = b.across.first + c * b.across.step;
    float* p = a.out + ((image * a.oh + row) * a.ow + column) * a.f + b.feature;
    const int64_t step = b.grid.by_place() ? a.oh * a.ow * a.f : b.across.step * a.f;
    for (int64_t j = 0; j < n; j++, p += step) out[i + j] = p;
  });
  for (int64_t j = b.count; j < round_up(b.count, kRows); j++) out[j] = spare;
}

void result_block(const ConvolutionArgs& a, const Block& b) {
  const Taps down(rows_of(a), b.down), across(columns_of(a), b.across);
  const int64_t taps = a.c ? down.count * across.count : 0, places = round_up(b.count, kRows);
  const int64_t chunk = block_of(most(a.c, 1), kSummed, 1), together = least(most(kSummed / chunk, 1), kMostTaps);
  const int64_t floats = kSummed * kPanel + round_up(kFeaturesAtOnce, kPanel);
  auto* panel = static_cast<float*>(thread_arena(floats * sizeof(float) + (together + 1) * places * sizeof(float*)));
  auto** out = reinterpret_cast<float**>(panel + floats);
  auto** table = const_cast<const float**>(out + places);
  fill_places(a, b, panel + kSummed * kPanel, out);
  if (taps == 0)
    for (int64_t i = 0; i < b.count; i++) memset(out[i], 0, b.features * sizeof(float));
  bool adds = false;
  for (int64_t first = 0; first < taps; first += together) {
    const int64_t some = least(together, taps - first);
    for (int64_t channel = 0; channel < a.c; channel += chunk, adds = true) {
      const int64_t steps = least(chunk, a.c - channel);
      for (int64_t t = 0; t < some; t++) {
        const int64_t row = (first + t) / across.count, column = (first + t) % across.count;
        fill_table(a, b, down.element[row], across.element[column], channel, table + t * places);
      }
      for (int64_t j = 0; j < b.features; j += kPanel) {
        const int64_t width = least(kPanel, b.features - j);
        for (int64_t t = 0; t < some; t++) {
          const int64_t row = (first + t) / across.count, column = (first + t) % across.count;
          const int64_t tap = down.which[row] * a.kw + across.which[column];
          pack_tap(a, tap, channel, steps, b.feature + j, width, panel + t * steps * kPanel);
        }
        with_vectors(width, [&](auto vectors) {
          for (int64_t i = 0; i < places; i += kRows) {
            float* to[kRows];
            for (int r = 0; r < kRows; r++) to[r] = out[i + r] + j;
            table_tile<decltype(vectors)::value>(table + i, places, some, steps, panel, to, width, adds);
          }
        });
      }
    }
  }
}

Parallel threads_of(const ConvolutionArgs& a, const Parallel& par) {
  Parallel p = par;
  if (a.n * a.oh * a.ow * a.f * a.kh * a.kw * a.c < kSerialProducts) p.threads = 1;
  return p;
}

// Pairs of a tap, in the block [first, first + count) of the result's places; those outside of x are left out.
int64_t find_pairs(const ConvolutionArgs& a, int64_t tap, int64_t first, int64_t count, const float* panel, Pair* pairs) {
  const Dimension rows = rows_of(a), columns = columns_of(a);
  auto set_of = [](const Dimension& line, int64_t k, Places& set, int64_t& element) {
    for (int64_t which = 0; which < line.sets(); which++)
      if (set = line.set(which); line.element(set, k, element)) return true;
    return false;
  };
  Places down, across;
  int64_t row, column, found = 0;
  if (!set_of(rows, tap / a.kw, down, row) || !set_of(columns, tap % a.kw, across, column)) return 0;
  const Inside high = rows.inside(down, row), wide = columns.inside(across, column);
  for (int64_t at = first; at < first + count;) {
    const int64_t line = at / a.ow, from = at % a.ow, n = least(a.ow - from, first + count - at);
    const int64_t o = line % a.oh - down.first, q = o / down.step;
    if (o >= 0 && o % down.step == 0 && q >= high.from && q < high.to) {
      const float* x = a.x + (line / a.oh * a.h + q * down.stride + row) * a.w * a.c + column * a.c;
      // The first of the set's columns from `from` on, and the first beyond the run.
      auto reached = [&](int64_t o) { return o <= across.first ? 0 : (o - across.first + across.step - 1) / across.step; };
      const int64_t last = least(reached(from + n), wide.to);
      for (int64_t p = most(reached(from), wide.from); p < last; p++)
        pairs[found++] = {x + p * across.stride * a.c,
                          panel + (at - first + across.first + p * across.step - from) * kPanel};
    }
    at += n;
  }
  return found;
}

// Tiles of the kernel's gradient: for each panel of features and some channels, the taps in turn.
struct Tiles {
  int64_t channels, count, taps, panels;
  explicit Tiles(const ConvolutionArgs& a)
      : channels(a.c), count((a.c + kRows - 1) / kRows), taps(a.kh * a.kw), panels((a.f + kPanel - 1) / kPanel) {}
  int64_t all() const { return count * taps * panels; }
  int64_t first(int64_t tile) const { return tile * (channels / count) + least(tile, channels % count); }
};

// Tiles [from, to) of the gradient, over all places; every sum is made by one thread, in one order.
void gradient_tiles(const ConvolutionArgs& a, const Tiles& tiles, int64_t from, int64_t to) {
  const int64_t floats = kSummed * kPanel, places = a.n * a.oh * a.ow;
  const int64_t bytes = floats * sizeof(float) + tiles.taps * (kSummed * sizeof(Pair) + sizeof(int64_t));
  auto* panel = static_cast<float*>(thread_arena(bytes));
  auto* pairs = reinterpret_cast<Pair*>(panel + floats);
  auto* found = reinterpret_cast<int64_t*>(pairs + tiles.taps * kSummed);
  const int64_t each = tiles.count * tiles.taps;
  auto over_tiles = [&](int64_t panel, const auto& f) {
    for (int64_t i = most(from, panel * each); i < least(to, (panel + 1) * each); i++) {
      const int64_t tile = i % each / tiles.taps, tap = i % tiles.taps, channel = tiles.first(tile);
      f(tap, channel, tiles.first(tile + 1) - channel, a.out + (tap * a.c + channel) * a.f + panel * kPanel);
    }
  };
  for (int64_t j = from / each; j * each < to; j++)
    over_tiles(j, [&](int64_t, int64_t, int64_t height, float* out) {
      for (int64_t r = 0; r < height; r++) memset(out + r * a.f, 0, least(kPanel, a.f - j * kPanel) * sizeof(float));
    });
  for (int64_t first = 0; first < places; first += kSummed) {
    const int64_t count = least(kSummed, places - first);
    for (int64_t t = 0; t < tiles.taps; t++)
      if (to - from >= tiles.taps || (t - from % tiles.taps + tiles.taps) % tiles.taps < to - from)
        found[t] = find_pairs(a, t, first, count, panel, pairs + t * kSummed);
    for (int64_t j = from / each; j * each < to; j++) {
      const int64_t width = least(kPanel, a.f - j * kPanel);
      pack_steps<Float32>(a.other + first * a.f + j * kPanel, a.f, count, width, kPanel, panel);
      with_vectors(width, [&](auto vectors) {
        over_tiles(j, [&](int64_t tap, int64_t channel, int64_t height, float* out) {
          if (found[tap] == 0) return;
          const Pair* of_tap = pairs + tap * kSummed;
          pairs_tile<decltype(vectors)::value>(height, of_tap, found[tap], channel, out, a.f, width);
        });
      });
    }
  }
}

}  // namespace

void dense_convolution(const ConvolutionArgs& a, const Parallel& par) {
  const Dimension rows = rows_of(a), columns = columns_of(a);
  const Parallel threads = threads_of(a, par);
  const int64_t sets = rows.sets() * columns.sets();
  const int64_t places = a.n * rows.set(0).count * columns.set(0).count;  // of the largest set
  int64_t height = block_of(places, kPlacesAtOnce, kRows), width = block_of(a.f, kFeaturesAtOnce, kPanel);
  auto tasks = [&] { return sets * ((places + height - 1) / height) * ((a.f + width - 1) / width); };
  if (tasks() < 2 * threads.threads) width = kPanel;
  while (tasks() < threads.threads && height >= 2 * kLeastPlaces) height = round_up(height / 2, kRows);
  const int64_t down = (places + height - 1) / height, across = (a.f + width - 1) / width;
  parallel_for(threads, sets * down * across, [&](int64_t task) {
    const int64_t set = task / (down * across), block = task % (down * across);
    const Places in_rows = rows.set(set / columns.sets()), in_columns = columns.set(set % columns.sets());
    const Grid grid{a.n, in_rows.count, in_columns.count};
    const int64_t first = block / across * height, feature = block % across * width;
    const int64_t count = least(height, grid.size() - first);
    if (count > 0) result_block(a, {in_rows, in_columns, grid, first, count, feature, least(width, a.f - feature)});
  });
}

void dense_convolution_gradient(const ConvolutionArgs& a, const Parallel& par) {
  const Parallel threads = threads_of(a, par);
  const Tiles tiles(a);
  const int64_t tasks = least(tiles.all(), most(2 * threads.threads, 1));
  parallel_for(threads, tasks, [&](int64_t task) {
    gradient_tiles(a, tiles, task * tiles.all() / tasks, (task + 1) * tiles.all() / tasks);
  });
}

}  // namespace jaxext::JAXEXT_ISA
#endif  // JAXEXT_KERNEL

#ifdef JAXEXT_HANDLER
#include "ffi.h"

JAXEXT_DECLARE(dense_convolution, ConvolutionArgs)
JAXEXT_DECLARE(dense_convolution_gradient, ConvolutionArgs)

namespace jaxext {
namespace {

using Numbers = ffi::Span<const int64_t>;
using Array = ffi::Buffer<ffi::DataType::F32, 4>;

ffi::Error set_window(const char* op, ConvolutionArgs& a, Numbers stride, Numbers dilation, Numbers base, Numbers low) {
  for (Numbers pair : {stride, dilation, base, low})
    if (pair.size() != 2) return bad_argument(op, "strides, dilations and padding", "of two numbers each");
  for (int d = 0; d < 2; d++) {
    a.stride[d] = stride[d], a.dilation[d] = dilation[d], a.base[d] = base[d], a.low[d] = low[d];
    if (a.stride[d] < 1 || a.dilation[d] < 1 || a.base[d] < 1)
      return bad_argument(op, "strides and dilations", "1 or more");
  }
  return ffi::Error::Success();
}

// `places` is [n, oh, ow, f], `taps` [kh, kw, c, f], or with f and c exchanged.
ffi::Error set_shapes(const char* op, ConvolutionArgs& a, Numbers x, Numbers places, Numbers taps) {
  a.n = x[0], a.h = x[1], a.w = x[2], a.c = x[3];
  a.oh = places[1], a.ow = places[2], a.f = places[3], a.kh = taps[0], a.kw = taps[1];
  if (places[0] != a.n) return bad_argument(op, "places", "of x's images, x being " + shape_text(x));
  if (taps[2 + a.turned] != a.c || taps[3 - a.turned] != a.f)
    return bad_argument(op, "taps", "of x's channels and the result's features, x being " + shape_text(x));
  if (a.kh > 64 || a.kw > 64) return bad_argument(op, "taps", "at most 64 each way, not " + shape_text(taps));
  return ffi::Error::Success();
}

ffi::Error dense_convolution_handler(ffi::ThreadPool pool, Array x, Array kernel, ffi::Result<Array> out, Numbers stride,
                               Numbers dilation, Numbers base, Numbers low, bool turned, bool reversed) {
  const char* op = "dense_convolution";
  ConvolutionArgs a{x.typed_data(), kernel.typed_data(), out->typed_data()};
  a.turned = turned, a.reversed = reversed;
  if (ffi::Error wrong = set_window(op, a, stride, dilation, base, low); wrong.failure()) return wrong;
  if (ffi::Error wrong = set_shapes(op, a, x.dimensions(), out->dimensions(), kernel.dimensions());
      wrong.failure())
    return wrong;
  if (out->element_count()) JAXEXT_DISPATCH(dense_convolution)(a, parallel(pool));
  return ffi::Error::Success();
}

ffi::Error dense_convolution_gradient_handler(ffi::ThreadPool pool, Array x, Array cotangent, ffi::Result<Array> out,
                                        Numbers stride, Numbers dilation, Numbers base, Numbers low) {
  const char* op = "dense_convolution_gradient";
  ConvolutionArgs a{x.typed_data(), cotangent.typed_data(), out->typed_data()};
  if (ffi::Error wrong = set_window(op, a, stride, dilation, base, low); wrong.failure()) return wrong;
  if (ffi::Error wrong = set_shapes(op, a, x.dimensions(), cotangent.dimensions(), out->dimensions()); wrong.failure())
    return wrong;
  if (out->element_count()) JAXEXT_DISPATCH(dense_convolution_gradient)(a, parallel(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxext

#define JAXEXT_CONVOLUTION(name)                                                 \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_##name, jaxext::name##_handler,           \
                                xla::ffi::Ffi::Bind()                            \
                                    .Ctx<xla::ffi::ThreadPool>()                 \
                                    .Arg<jaxext::Array>()                        \
                                    .Arg<jaxext::Array>()                        \
                                    .Ret<jaxext::Array>()                        \
                                    .Attr<xla::ffi::Span<const int64_t>>("stride")    \
                                    .Attr<xla::ffi::Span<const int64_t>>("dilation")  \
                                    .Attr<xla::ffi::Span<const int64_t>>("base")      \
                                    .Attr<xla::ffi::Span<const int64_t>>("low")
JAXEXT_CONVOLUTION(dense_convolution).Attr<bool>("turned").Attr<bool>("reversed"));
JAXEXT_CONVOLUTION(dense_convolution_gradient));
#endif  // JAXEXT_HANDLER
