// A register holds as many channels of one place as it has lanes. The taps of a kernel's row stay in registers while a
// row of x passes by, so that each element is loaded once for each tap and multiplied at once.
#include "cpu/depthwise.h"

#ifdef JAXEXT_KERNEL
#include "vec.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kTasks = 64;  // at least, where there are so many rows
constexpr int kMostTaps = 8;    // of a kernel's row, in registers at once

// Lanes of the last register that hold channels; kLanes in all others.
template <bool kWhole, class T>
JAXEXT_INLINE vf channels(const T* p, int64_t lanes) {
  return kWhole ? load(p) : load_first(p, lanes);
}

// One dimension's places: where tap k of place o is, and between which places all of some taps are inside.
struct Line {
  int64_t size, places, stride, dilation, base, low;

  JAXEXT_INLINE int64_t at(int64_t o, int64_t k) const {  // -1: outside, or between elements
    const int64_t position = o * stride + k * dilation - low;
    if (position < 0 || position > (size - 1) * base) return -1;
    if (base == 1) return position;  // a division takes as long as several rows of taps
    return position % base ? -1 : position / base;
  }
  JAXEXT_INLINE int64_t first_inside(int64_t k) const {
    if (base != 1) return places;
    const int64_t missing = low - k * dilation;
    const int64_t first = missing > 0 ? (missing + stride - 1) / stride : 0;
    return first < places ? first : places;
  }
  JAXEXT_INLINE int64_t end_inside(int64_t k, int64_t first) const {
    const int64_t room = size - 1 + low - k * dilation;
    int64_t end = room < 0 ? 0 : room / stride + 1;
    end = end < places ? end : places;
    return end > first ? end : first;
  }
};

// A row of places that J taps from tap `k` on go over: inside(o, x, turn) with x where tap k of place o is and turns 0
// and 1 for places in turn, edge(o, j, x).
template <int J, class T, class Inside, class Edge>
JAXEXT_INLINE void go_over(const Line& line, const T* x, int64_t c, int64_t k, const Inside& inside, const Edge& edge) {
  const int64_t first = line.first_inside(k), end = line.end_inside(k + J - 1, first);
  auto one_by_one = [&](int64_t from, int64_t to) {
    for (int64_t o = from; o < to; o++)
      for (int j = 0; j < J; j++)
        if (const int64_t i = line.at(o, k + j); i >= 0) edge(o, j, x + i * c);
  };
  one_by_one(0, first);
  auto under = [&](int64_t o) { return x + (o * line.stride + k * line.dilation - line.low) * c; };
  int64_t o = first;
  for (; o + 1 < end; o += 2) inside(o, under(o), 0), inside(o + 1, under(o + 1), 1);
  if (o < end) inside(o, under(o), 0);
  one_by_one(end, line.places);
}

// sums [places][lanes] += the taps k to k + J of a kernel's row times a row of x.
template <bool kWhole, int J, class T>
void add_taps(const Line& line, const T* x, const T* kernel, int64_t c, int64_t lanes, int64_t k, float* sums) {
  vf tap[J];
  JAXEXT_UNROLL
  for (int j = 0; j < J; j++) tap[j] = channels<kWhole>(kernel + (k + j) * c, lanes);
  const int64_t apart = line.dilation * c;
  auto inside = [&](int64_t o, const T* p, int) __attribute__((always_inline)) {
    vf sum = load(sums + o * kLanes);
    JAXEXT_UNROLL
    for (int j = 0; j < J; j++) sum = fma(channels<kWhole>(p + j * apart, lanes), tap[j], sum);
    store(sums + o * kLanes, sum);
  };
  auto edge = [&](int64_t o, int j, const T* p) {
    store(sums + o * kLanes, fma(channels<kWhole>(p, lanes), tap[j], load(sums + o * kLanes)));
  };
  go_over<J>(line, x, c, k, inside, edge);
}

// sums [taps][lanes] += the products of a row of x, under each of the taps k to k + J, with a row of cotangents.
template <bool kWhole, int J, class T>
void add_products(const Line& line, const T* x, const T* cotangent, int64_t c, int64_t lanes, int64_t k, float* sums) {
  constexpr int kChains = J <= 4 ? 2 : 1;  // enough independent sums to hide an addition's latency
  vf sum[kChains][J] = {};
  const int64_t apart = line.dilation * c;
  auto inside = [&](int64_t o, const T* p, int turn) __attribute__((always_inline)) {
    const vf given = channels<kWhole>(cotangent + o * c, lanes);
    vf* chain = sum[turn % kChains];
    JAXEXT_UNROLL
    for (int j = 0; j < J; j++) chain[j] = fma(channels<kWhole>(p + j * apart, lanes), given, chain[j]);
  };
  auto edge = [&](int64_t o, int j, const T* p) {
    sum[0][j] = fma(channels<kWhole>(p, lanes), channels<kWhole>(cotangent + o * c, lanes), sum[0][j]);
  };
  go_over<J>(line, x, c, k, inside, edge);
  // What a row gives is added to what others gave, so that the error grows with the rows and not with the places.
  for (int j = 0; j < J; j++) {
    vf total = sum[0][j];
    if (kChains == 2) total += sum[kChains - 1][j];
    store(sums + (k + j) * kLanes, load(sums + (k + j) * kLanes) + total);
  }
}

template <bool kGradient, bool kWhole, int J, class T>
JAXEXT_INLINE void some_taps(const Line& line, const T* x, const T* other, int64_t c, int64_t lanes, int64_t k,
                             float* sums) {
  kGradient ? add_products<kWhole, J>(line, x, other, c, lanes, k, sums)
            : add_taps<kWhole, J>(line, x, other, c, lanes, k, sums);
}

template <bool kGradient, bool kWhole, class T>
void all_taps(const Line& line, int64_t taps, const T* x, const T* other, int64_t c, int64_t lanes, float* sums) {
  for (int64_t k = 0; k < taps; k += kMostTaps) {
    switch (taps - k < kMostTaps ? taps - k : kMostTaps) {
      case 1: some_taps<kGradient, kWhole, 1>(line, x, other, c, lanes, k, sums); break;
      case 2: some_taps<kGradient, kWhole, 2>(line, x, other, c, lanes, k, sums); break;
      case 3: some_taps<kGradient, kWhole, 3>(line, x, other, c, lanes, k, sums); break;
      case 4: some_taps<kGradient, kWhole, 4>(line, x, other, c, lanes, k, sums); break;
      case 5: some_taps<kGradient, kWhole, 5>(line, x, other, c, lanes, k, sums); break;
      case 6: some_taps<kGradient, kWhole, 6>(line, x, other, c, lanes, k, sums); break;
      case 7: some_taps<kGradient, kWhole, 7>(line, x, other, c, lanes, k, sums); break;
      default: some_taps<kGradient, kWhole, 8>(line, x, other, c, lanes, k, sums);
    }
  }
}

Line rows_of(const DepthwiseArgs& a) { return {a.h, a.oh, a.stride[0], a.dilation[0], a.base[0], a.low[0]}; }
Line columns_of(const DepthwiseArgs& a) { return {a.w, a.ow, a.stride[1], a.dilation[1], a.base[1], a.low[1]}; }

template <class T>
JAXEXT_INLINE void put(T* p, const float* sums, int64_t count, int64_t c, int64_t lanes) {
  for (int64_t o = 0; o < count; o++) store_first(p + o * c, load(sums + o * kLanes), lanes);
}

// The channels from `channel` on that one register holds: their number, kLanes but in the last block.
JAXEXT_INLINE int64_t lanes_from(const DepthwiseArgs& a, int64_t channel) {
  return a.c - channel < kLanes ? a.c - channel : kLanes;
}

// One row of a result, for the channels from `channel` on.
template <bool kWhole, class T>
void result_row(const DepthwiseArgs& a, int64_t image, int64_t o, int64_t channel, float* sums) {
  const Line rows = rows_of(a), columns = columns_of(a);
  const int64_t lanes = lanes_from(a, channel);
  const T* x = static_cast<const T*>(a.x) + image * a.h * a.w * a.c + channel;
  const T* kernel = static_cast<const T*>(a.other) + channel;
  memset(sums, 0, a.ow * kLanes * sizeof(float));
  for (int64_t k = 0; k < a.kh; k++)
    if (const int64_t row = rows.at(o, k); row >= 0)
      all_taps<false, kWhole>(columns, a.kw, x + row * a.w * a.c, kernel + k * a.kw * a.c, a.c, lanes, sums);
  put(static_cast<T*>(a.out) + (image * a.oh + o) * a.ow * a.c + channel, sums, a.ow, a.c, lanes);
}

// What one row of cotangents adds to the kernel's, for the channels from `channel` on.
template <bool kWhole, class T>
void gradient_row(const DepthwiseArgs& a, int64_t image, int64_t o, int64_t channel, float* sums) {
  const Line rows = rows_of(a), columns = columns_of(a);
  const int64_t lanes = lanes_from(a, channel);
  const T* x = static_cast<const T*>(a.x) + image * a.h * a.w * a.c + channel;
  const T* cotangent = static_cast<const T*>(a.other) + (image * a.oh + o) * a.ow * a.c + channel;
  for (int64_t k = 0; k < a.kh; k++)
    if (const int64_t row = rows.at(o, k); row >= 0)
      all_taps<true, kWhole>(columns, a.kw, x + row * a.w * a.c, cotangent, a.c, lanes, sums + k * a.kw * kLanes);
}

// Rows in turn, and of each all channels, so that memory is read and written in its order.
template <class T>
void result(const DepthwiseArgs& a, const Parallel& par) {
  const int64_t wanted = (kTasks + a.n - 1) / a.n, parts = wanted < a.oh ? wanted : a.oh;
  const int64_t rows = (a.oh + parts - 1) / parts;
  parallel_for(par, a.n * parts, [&](int64_t task) {
    const int64_t image = task / parts, first = task % parts * rows;
    const int64_t end = first + rows < a.oh ? first + rows : a.oh;
    auto* sums = static_cast<float*>(thread_arena(a.ow * kLanes * sizeof(float)));
    for (int64_t o = first; o < end; o++)
      for (int64_t channel = 0; channel < a.c; channel += kLanes)
        lanes_from(a, channel) == kLanes ? result_row<true, T>(a, image, o, channel, sums)
                                         : result_row<false, T>(a, image, o, channel, sums);
  });
}

// A task has some channels and all images: every sum is made by one thread, in one order.
template <class T>
void gradient(const DepthwiseArgs& a, const Parallel& par) {
  const int64_t blocks = (a.c + kLanes - 1) / kLanes, taps = a.kh * a.kw;
  const int64_t threads = par.threads > 0 ? par.threads : 1, group = blocks > threads ? blocks / threads : 1;
  parallel_for(par, (blocks + group - 1) / group, [&](int64_t task) {
    const int64_t from = task * group * kLanes, to = from + group * kLanes < a.c ? from + group * kLanes : a.c;
    const int64_t bytes = group * taps * kLanes * sizeof(float);
    auto* sums = static_cast<float*>(thread_arena(bytes));
    memset(sums, 0, bytes);
    for (int64_t row = 0; row < a.n * a.oh; row++)
      for (int64_t channel = from; channel < to; channel += kLanes) {
        float* own = sums + (channel - from) * taps;
        lanes_from(a, channel) == kLanes ? gradient_row<true, T>(a, row / a.oh, row % a.oh, channel, own)
                                         : gradient_row<false, T>(a, row / a.oh, row % a.oh, channel, own);
      }
    for (int64_t channel = from; channel < to; channel += kLanes)
      put(static_cast<T*>(a.out) + channel, sums + (channel - from) * taps, taps, a.c, lanes_from(a, channel));
  });
}

}  // namespace

void depthwise(const DepthwiseArgs& a, const Parallel& par) {
  a.bf16 ? result<bf16>(a, par) : result<float>(a, par);
}
void depthwise_gradient(const DepthwiseArgs& a, const Parallel& par) {
  a.bf16 ? gradient<bf16>(a, par) : gradient<float>(a, par);
}

}  // namespace jaxext::JAXEXT_ISA
#endif

#ifdef JAXEXT_HANDLER
#include "ffi.h"

JAXEXT_DECLARE(depthwise, DepthwiseArgs)
JAXEXT_DECLARE(depthwise_gradient, DepthwiseArgs)

namespace jaxext {
namespace {

using Pair = ffi::Span<const int64_t>;

ffi::Error check(const char* op, const DepthwiseArgs& a, ffi::AnyBuffer x, ffi::AnyBuffer other, ffi::AnyBuffer out) {
  if (x.dimensions().size() != 4 || !is_float(x.element_type()))
    return bad_argument(op, "x", "float32 or bfloat16 of rank 4: images, rows, columns, channels");
  if (other.element_type() != x.element_type() || out.element_type() != x.element_type())
    return bad_argument(op, "operands and result", "of one type");
  for (int d = 0; d < 2; d++)
    if (a.stride[d] < 1 || a.dilation[d] < 1 || a.base[d] < 1)
      return bad_argument(op, "strides and dilations", "1 or more");
  return ffi::Error::Success();
}

bool is_shape(ffi::Span<const int64_t> dims, int64_t rank, const int64_t* expected) {
  bool same = (int64_t)dims.size() == rank;
  for (int64_t d = 0; same && d < rank; d++) same = dims[d] == expected[d];
  return same;
}

// `image` has the places [n, oh, ow, c], `taps` the taps [kh, kw, c].
ffi::Error run(const char* op, bool gradient, ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer other,
               ffi::AnyBuffer out, Pair stride, Pair dilation, Pair base, Pair low) {
  for (Pair pair : {stride, dilation, base, low})
    if (pair.size() != 2) return bad_argument(op, "strides, dilations and padding", "of two numbers each");
  DepthwiseArgs a{};
  for (int d = 0; d < 2; d++)
    a.stride[d] = stride[d], a.dilation[d] = dilation[d], a.base[d] = base[d], a.low[d] = low[d];
  if (ffi::Error wrong = check(op, a, x, other, out); wrong.failure()) return wrong;
  const auto dims = x.dimensions();
  const auto image = gradient ? other.dimensions() : out.dimensions();
  const auto taps = gradient ? out.dimensions() : other.dimensions();
  a.n = dims[0], a.h = dims[1], a.w = dims[2], a.c = dims[3];
  const int64_t images[] = {a.n, image.size() == 4 ? image[1] : 0, image.size() == 4 ? image[2] : 0, a.c};
  const int64_t kernel[] = {taps.size() == 3 ? taps[0] : 0, taps.size() == 3 ? taps[1] : 0, a.c};
  if (!is_shape(image, 4, images)) return bad_argument(op, "places", "of x's images and channels, x being " + shape_text(dims));
  if (!is_shape(taps, 3, kernel)) return bad_argument(op, "taps", "of rank 3 with x's channels, x being " + shape_text(dims));
  a.oh = images[1], a.ow = images[2], a.kh = kernel[0], a.kw = kernel[1];
  a.x = x.untyped_data(), a.other = other.untyped_data(), a.out = out.untyped_data();
  a.bf16 = x.element_type() == ffi::DataType::BF16;
  if (out.element_count() == 0) return ffi::Error::Success();
  gradient ? JAXEXT_DISPATCH(depthwise_gradient)(a, parallel(pool)) : JAXEXT_DISPATCH(depthwise)(a, parallel(pool));
  return ffi::Error::Success();
}

ffi::Error depthwise_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer kernel,
                             ffi::Result<ffi::AnyBuffer> out, Pair stride, Pair dilation, Pair base, Pair low) {
  return run("depthwise", false, pool, x, kernel, *out, stride, dilation, base, low);
}
ffi::Error depthwise_gradient_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer cotangent,
                                      ffi::Result<ffi::AnyBuffer> out, Pair stride, Pair dilation, Pair base,
                                      Pair low) {
  return run("depthwise_gradient", true, pool, x, cotangent, *out, stride, dilation, base, low);
}

}  // namespace
}  // namespace jaxext

#define JAXEXT_DEPTHWISE(name)                                                   \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_##name, jaxext::name##_handler,           \
                                xla::ffi::Ffi::Bind()                            \
                                    .Ctx<xla::ffi::ThreadPool>()                 \
                                    .Arg<xla::ffi::AnyBuffer>()                  \
                                    .Arg<xla::ffi::AnyBuffer>()                  \
                                    .Ret<xla::ffi::AnyBuffer>()                  \
                                    .Attr<ffi::Span<const int64_t>>("stride")    \
                                    .Attr<ffi::Span<const int64_t>>("dilation")  \
                                    .Attr<ffi::Span<const int64_t>>("base")      \
                                    .Attr<ffi::Span<const int64_t>>("low"))
namespace ffi = xla::ffi;
JAXEXT_DEPTHWISE(depthwise);
JAXEXT_DEPTHWISE(depthwise_gradient);
#endif  // JAXEXT_HANDLER
