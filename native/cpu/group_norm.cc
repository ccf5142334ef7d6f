// Group normalisation, forward and backward, with f32 statistics.
//
// Every sum is kept per channel and only then added up over a group's channels: no inner loop knows of groups, which may
// be as narrow as one channel. An image is read in chunks of pixels. A chunk's variance is taken about its own mean while
// the chunk is in the first cache, and chunks are merged in order (Chan, Golub and LeVeque, "Updating formulae and a
// pairwise algorithm for computing sample variances", 1979): one pass, no cancellation, and threads change no bit.
#include "group_norm.h"

#ifdef JAXEXT_KERNEL
#include "norm_parameters.h"

namespace jaxext::JAXEXT_ISA {
namespace {

// Enough pixels that per-channel sums are small beside them, few enough that they stay in the first cache.
int64_t pixels_per_chunk(int64_t channels) { return 4096 / channels > 64 ? 4096 / channels : 64; }

// One image's chunks in order, and the pixels of each.
struct Chunks {
  int64_t pixels, channels, step, count;
  explicit Chunks(const GroupNormShape& s)
      : pixels(s.pixels), channels(s.channels), step(pixels_per_chunk(s.channels)), count((pixels + step - 1) / step) {}
  int64_t size(int64_t chunk) const { return chunk + 1 < count ? step : pixels - chunk * step; }
  // The chunk's first value, of [images, pixels, channels].
  int64_t start(int64_t image, int64_t chunk) const { return (image * pixels + chunk * step) * channels; }
};

// read(image, chunk) for all chunks of an image, then meet(image), then write(image, chunk) for all of them.
template <class Read, class Meet, class Write>
void over_images(const Parallel& all, int64_t images, const Chunks& chunks, const Read& read, const Meet& meet,
                 const Write& write) {
  const Parallel par = threads_for(all, images * chunks.pixels * chunks.channels);
  if (par.threads <= 1 || images % par.threads == 0 || images >= 4 * par.threads) {
    parallel_for(par, images, [&](int64_t image) {
      for (int64_t c = 0; c < chunks.count; c++) read(image, c);
      meet(image);
      // Backwards: what was read last is still in a cache.
      for (int64_t c = chunks.count; c-- > 0;) write(image, c);
    });
    return;
  }
  const int64_t total = images * chunks.count, each = kSerialElements / (chunks.step * chunks.channels) + 1;
  auto share = [&](auto&& body) {
    parallel_for(par, (total + each - 1) / each, [&](int64_t task) {
      const int64_t end = (task + 1) * each < total ? (task + 1) * each : total;
      for (int64_t i = task * each; i < end; i++) body(i / chunks.count, i % chunks.count);
    });
  };
  share(read);
  for (int64_t image = 0; image < images; image++) meet(image);
  share(write);
}

// body(first pixel, how many as a constant) over pixels: four at a time share what is loaded per channel.
template <int n>
struct Pixels {
  static constexpr int count = n;
};
template <class Body>
JAXEXT_INLINE void over_pixels(int64_t pixels, Body&& body) {
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4) body(p, Pixels<4>{});
  for (; p < pixels; p++) body(p, Pixels<1>{});
}

// Per channel of a chunk: its mean, and the sum of squared distances from it.
template <class X>
JAXEXT_NOINLINE void chunk_moments(const X* x, int64_t pixels, int64_t n, float* mean, float* squares) {
  __builtin_memset(mean, 0, n * sizeof(float));
  __builtin_memset(squares, 0, n * sizeof(float));
  over_pixels(pixels, [&](int64_t p, auto at) __attribute__((always_inline)) {
    const X* row = x + p * n;
    over_row(n, JAXEXT_BODY {
      vf sum = part.get(row + j);
      JAXEXT_UNROLL for (int r = 1; r < at.count; r++) sum += part.get(row + r * n + j);
      part.put(mean + j, part.get(mean + j) + sum);
    });
  });
  const vf share = splat(1.f / static_cast<float>(pixels));
  over_row(n, JAXEXT_BODY { part.put(mean + j, part.get(mean + j) * share); });
  over_pixels(pixels, [&](int64_t p, auto at) __attribute__((always_inline)) {
    const X* row = x + p * n;
    over_row(n, JAXEXT_BODY {
      const vf middle = part.get(mean + j);
      vf sum = part.get(squares + j);
      JAXEXT_UNROLL for (int r = 0; r < at.count; r++) {
        const vf d = part.get(row + r * n + j) - middle;
        sum = fma(d, d, sum);
      }
      part.put(squares + j, sum);
    });
  });
}

// Means and squares of an image's chunks, [chunks, 2, channels], into those of the image, in the first chunk's place.
void merge_chunks(const Chunks& chunks, float* moments) {
  const int64_t n = chunks.channels;
  const float share = 1.f / static_cast<float>(chunks.pixels);
  over_row(n, JAXEXT_BODY {
    const vf first = part.get(moments + j);
    vf shift = {}, squares = {};
    for (int64_t c = 1; c < chunks.count; c++)
      shift += (part.get(moments + 2 * c * n + j) - first) * splat(static_cast<float>(chunks.size(c)));
    const vf mean = first + shift * splat(share);
    for (int64_t c = 0; c < chunks.count; c++) {
      const vf d = part.get(moments + 2 * c * n + j) - mean;
      squares += fma(d * d, splat(static_cast<float>(chunks.size(c))), part.get(moments + (2 * c + 1) * n + j));
    }
    part.put(moments + j, mean);
    part.put(moments + n + j, squares);
  });
}

struct Statistics {
  float mean, rstd;
};

// Of a group of `size` channels, from their means and squares.
Statistics group_statistics(const float* means, const float* squares, int64_t size, int64_t pixels, float epsilon) {
  float shift = 0.f, total = 0.f;
  for (int64_t c = 1; c < size; c++) shift += means[c] - means[0];
  const float mean = means[0] + shift / static_cast<float>(size);
  for (int64_t c = 0; c < size; c++)
    total += squares[c] + (means[c] - mean) * (means[c] - mean) * static_cast<float>(pixels);
  return {mean, 1.f / __builtin_sqrtf(total / static_cast<float>(size * pixels) + epsilon)};
}

template <class X, class O>
void forward(const GroupNormForwardArgs& a, const Parallel& par) {
  const Chunks chunks(a.shape);
  const int64_t n = a.shape.channels, groups = a.shape.groups, size = n / groups, images = a.shape.images;
  float* scale = static_cast<float*>(thread_arena((2 + 2 * images * (chunks.count + 1)) * n * sizeof(float)));
  float *bias = scale + n, *applied = bias + n, *moments = applied + 2 * images * n;
  widen_parameter(a.scale, n, 0.f, 1.f, scale);
  widen_parameter(a.bias, n, 0.f, 0.f, bias);
  const X* x = static_cast<const X*>(a.x.data);
  O* out = static_cast<O*>(a.out.data);
  const bool stream = past_caches(out, images * a.shape.pixels, n);
  auto read = [&](int64_t image, int64_t c) {
    float* at = moments + 2 * (image * chunks.count + c) * n;
    chunk_moments(x + chunks.start(image, c), chunks.size(c), n, at, at + n);
  };
  auto meet = [&](int64_t image) {
    float *at = moments + 2 * image * chunks.count * n, *mean = applied + 2 * image * n, *slope = mean + n;
    merge_chunks(chunks, at);
    for (int64_t g = 0; g < groups; g++) {
      const Statistics s = group_statistics(at + g * size, at + n + g * size, size, a.shape.pixels, a.epsilon);
      a.mean[image * groups + g] = s.mean;
      a.rstd[image * groups + g] = s.rstd;
      for (int64_t c = g * size; c < (g + 1) * size; c++) mean[c] = s.mean, slope[c] = s.rstd * scale[c];
    }
  };
  auto write = [&](int64_t image, int64_t c) {
    const float *mean = applied + 2 * image * n, *slope = mean + n;
    const int64_t start = chunks.start(image, c);
    over_pixels(chunks.size(c), [&](int64_t p, auto at) __attribute__((always_inline)) {
      const X* from = x + start + p * n;
      O* to = out + start + p * n;
      over_row(n, JAXEXT_BODY {
        const vf m = part.get(mean + j), s = part.get(slope + j), b = part.get(bias + j);
        JAXEXT_UNROLL for (int r = 0; r < at.count; r++)
          part.put(to + r * n + j, fma(part.get(from + r * n + j) - m, s, b), stream);
      });
    });
    finish_stores(stream);
  };
  over_images(par, images, chunks, read, meet, write);
}

// Per channel of a chunk: the sum of g, and of g (x - mean).
template <class X, class O>
JAXEXT_NOINLINE void chunk_sums(const X* x, const O* grad, int64_t pixels, int64_t n, const float* mean, float* total,
                                float* along) {
  __builtin_memset(total, 0, n * sizeof(float));
  __builtin_memset(along, 0, n * sizeof(float));
  over_pixels(pixels, [&](int64_t p, auto at) __attribute__((always_inline)) {
    const X* row = x + p * n;
    const O* g_row = grad + p * n;
    over_row(n, JAXEXT_BODY {
      const vf m = part.get(mean + j);
      vf sum = part.get(total + j), product = part.get(along + j);
      JAXEXT_UNROLL for (int r = 0; r < at.count; r++) {
        const vf g = part.get(g_row + r * n + j);
        sum += g;
        product = fma(g, part.get(row + r * n + j) - m, product);
      }
      part.put(total + j, sum);
      part.put(along + j, product);
    });
  });
}

// dx = slope g - (along (x - mean) + shift), each a vector over the channels of one image.
struct Gradient {
  float *mean, *slope, *along, *shift;
  Gradient(float* at, int64_t n) : mean(at), slope(at + n), along(at + 2 * n), shift(at + 3 * n) {}
};

// The gradient's vectors for one group, from its channels' sums; `along` becomes the sum of g (x - mean) / std.
void group_gradient(const Gradient& to, const float* scale, const float* total, float* along, int64_t size,
                    int64_t pixels, float rstd) {
  float shift = 0.f, slope = 0.f;
  for (int64_t c = 0; c < size; c++) {
    along[c] *= rstd;
    shift += scale[c] * total[c];
    slope += scale[c] * along[c];
  }
  const float share = rstd / static_cast<float>(size * pixels);
  for (int64_t c = 0; c < size; c++) {
    to.slope[c] = rstd * scale[c];
    to.along[c] = rstd * slope * share;
    to.shift[c] = shift * share;
  }
}

template <class X, class O>
JAXEXT_NOINLINE void write_gradient(const X* x, const O* grad, X* dx, const Gradient& v, int64_t pixels, int64_t n,
                                    bool stream) {
  over_pixels(pixels, [&](int64_t p, auto at) __attribute__((always_inline)) {
    const int64_t start = p * n;
    over_row(n, JAXEXT_BODY {
      const vf mean = part.get(v.mean + j), slope = part.get(v.slope + j), along = part.get(v.along + j);
      const vf shift = part.get(v.shift + j);
      JAXEXT_UNROLL for (int r = 0; r < at.count; r++) {
        const int64_t i = start + r * n + j;
        const vf moved = fma(part.get(x + i) - mean, along, shift);
        part.put(dx + i, fma(part.get(grad + i), slope, -moved), stream);
      }
    });
  });
  finish_stores(stream);
}

template <class X, class O>
void backward(const GroupNormBackwardArgs& a, const Parallel& par) {
  const Chunks chunks(a.shape);
  const int64_t n = a.shape.channels, groups = a.shape.groups, size = n / groups, images = a.shape.images;
  float* scale = static_cast<float*>(thread_arena((1 + images * (4 + 2 * chunks.count)) * n * sizeof(float)));
  float *vectors = scale + n, *sums = vectors + 4 * images * n;
  widen_parameter(a.scale, n, 0.f, 1.f, scale);
  const X* x = static_cast<const X*>(a.x.data);
  const O* grad = static_cast<const O*>(a.grad.data);
  X* dx = static_cast<X*>(a.dx.data);
  const bool stream = dx && past_caches(dx, images * a.shape.pixels, n);
  for (int64_t image = 0; image < images; image++)
    for (int64_t c = 0; c < n; c++) vectors[4 * image * n + c] = a.mean[image * groups + c / size];
  const int64_t stride = 2 * chunks.count * n;  // between the sums of images
  auto read = [&](int64_t image, int64_t c) {
    const int64_t start = chunks.start(image, c);
    float* at = sums + image * stride + 2 * c * n;
    chunk_sums(x + start, grad + start, chunks.size(c), n, vectors + 4 * image * n, at, at + n);
  };
  auto meet = [&](int64_t image) {
    const Gradient to(vectors + 4 * image * n, n);
    float* at = sums + image * stride;
    for (int64_t c = 1; c < chunks.count; c++)
      over_row(2 * n, JAXEXT_BODY { part.put(at + j, part.get(at + j) + part.get(at + 2 * c * n + j)); });
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = g * size;
      const Gradient of_group{to.mean + first, n};
      group_gradient(of_group, scale + first, at + first, at + n + first, size, a.shape.pixels, a.rstd[image * groups + g]);
    }
  };
  auto write = [&](int64_t image, int64_t c) {
    const int64_t start = chunks.start(image, c);
    const Gradient vectors_here(vectors + 4 * image * n, n);
    if (dx) write_gradient(x + start, grad + start, dx + start, vectors_here, chunks.size(c), n, stream);
  };
  over_images(par, images, chunks, read, meet, write);
  add_chunks_to(a.dscale, sums + n, images, stride, n, par);
  add_chunks_to(a.dbias, sums, images, stride, n, par);
}

}  // namespace

void group_norm_forward(const GroupNormForwardArgs& a, const Parallel& par) {
  if (a.x.bf16) a.out.bf16 ? forward<bf16, bf16>(a, par) : forward<bf16, float>(a, par);
  else a.out.bf16 ? forward<float, bf16>(a, par) : forward<float, float>(a, par);
}
void group_norm_backward(const GroupNormBackwardArgs& a, const Parallel& par) {
  if (a.x.bf16) a.grad.bf16 ? backward<bf16, bf16>(a, par) : backward<bf16, float>(a, par);
  else a.grad.bf16 ? backward<float, bf16>(a, par) : backward<float, float>(a, par);
}

}  // namespace jaxext::JAXEXT_ISA
#endif  // JAXEXT_KERNEL

#ifdef JAXEXT_HANDLER
#include <vector>

#include "norm_operands.h"

JAXEXT_DECLARE(group_norm_forward, GroupNormForwardArgs)
JAXEXT_DECLARE(group_norm_backward, GroupNormBackwardArgs)

namespace jaxext {
namespace {

// The shape that x's dimensions and the number of groups make; groups is 0 where they fit none.
GroupNormShape shape_of(ffi::Span<const int64_t> dims, int64_t groups) {
  const size_t rank = dims.size();
  const int64_t channels = dims[rank - 1];
  const bool divides = groups > 0 && channels > 0 && channels % groups == 0;
  return {product(dims, 0, rank - 2), dims[rank - 2], channels, divides ? groups : 0};
}

// The shape of a statistic: x's, with groups in place of pixels and channels.
std::vector<int64_t> statistics_shape(ffi::Span<const int64_t> dims, int64_t groups) {
  std::vector<int64_t> shape(dims.begin(), dims.end() - 2);
  shape.push_back(groups);
  return shape;
}

// Operands: x, [scale], [bias]. Results: out, mean, rstd.
ffi::Error forward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, float epsilon,
                   int64_t groups, bool has_scale, bool has_bias) {
  const char* op = "group_norm";
  const size_t n_args = 1 + has_scale + has_bias;
  if (args.size() != n_args || rets.size() != 3) return bad_argument(op, "x", "followed by what the flags name");
  const auto first = args.get<ffi::AnyBuffer>(0);
  if (!first.has_value() || first->dimensions().size() < 2) return bad_argument(op, "x", "an array of rank 2 or more");
  const auto dims = first->dimensions();
  GroupNormForwardArgs a{};
  a.shape = shape_of(dims, groups);
  if (a.shape.groups == 0) return bad_argument(op, "groups", "a divisor of x's last dimension");
  const std::vector<int64_t> statistics = statistics_shape(dims, groups);
  NormReader reader{op, dims};
  size_t arg = 0;
  auto in = [&](const char* name, bool rowwise) {
    return reader.read(*args.get<ffi::AnyBuffer>(arg++), name, rowwise);
  };
  a.x = in("x", true);
  if (has_scale) a.scale = in("scale", false);
  if (has_bias) a.bias = in("bias", false);
  a.out = reader.read(**rets.get<ffi::AnyBuffer>(0), "out", true);
  a.mean = reader.statistic(**rets.get<ffi::AnyBuffer>(1), "mean", statistics);
  a.rstd = reader.statistic(**rets.get<ffi::AnyBuffer>(2), "rstd", statistics);
  if (reader.error.failure()) return reader.error;
  a.epsilon = epsilon;
  if (a.shape.images == 0 || a.shape.pixels == 0) return ffi::Error::Success();
  JAXEXT_DISPATCH(group_norm_forward)(a, parallel(pool));
  return ffi::Error::Success();
}

// Operands: x, [scale], [bias], mean, rstd, grad. Results: [dx], [dscale], [dbias].
ffi::Error backward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t groups,
                    bool has_scale, bool has_bias, bool wants_dx, bool wants_dscale, bool wants_dbias) {
  const char* op = "group_norm_backward";
  const size_t n_args = 4 + has_scale + has_bias, n_rets = static_cast<size_t>(wants_dx) + wants_dscale + wants_dbias;
  if (args.size() != n_args || rets.size() != n_rets) return bad_argument(op, "x", "followed by what the flags name");
  const auto first = args.get<ffi::AnyBuffer>(0);
  if (!first.has_value() || first->dimensions().size() < 2) return bad_argument(op, "x", "an array of rank 2 or more");
  const auto dims = first->dimensions();
  GroupNormBackwardArgs a{};
  a.shape = shape_of(dims, groups);
  if (a.shape.groups == 0) return bad_argument(op, "groups", "a divisor of x's last dimension");
  const std::vector<int64_t> statistics = statistics_shape(dims, groups);
  NormReader reader{op, dims};
  size_t arg = 0, ret = 0;
  auto in = [&](const char* name, bool rowwise) {
    return reader.read(*args.get<ffi::AnyBuffer>(arg++), name, rowwise);
  };
  auto out = [&](const char* name, bool rowwise) {
    return reader.read(**rets.get<ffi::AnyBuffer>(ret++), name, rowwise);
  };
  a.x = in("x", true);
  if (has_scale) a.scale = in("scale", false);
  if (has_bias) in("bias", false);
  a.mean = reader.statistic(*args.get<ffi::AnyBuffer>(arg++), "mean", statistics);
  a.rstd = reader.statistic(*args.get<ffi::AnyBuffer>(arg++), "rstd", statistics);
  a.grad = in("grad", true);
  if (wants_dx) a.dx = out("dx", true);
  if (wants_dscale) a.dscale = out("dscale", false);
  if (wants_dbias) a.dbias = out("dbias", false);
  if (reader.error.failure()) return reader.error;
  if (wants_dx && a.dx.bf16 != a.x.bf16) return bad_argument(op, "dx", "of x's type");
  if (a.shape.pixels == 0) a.shape.images = 0;  // the same zeros
  JAXEXT_DISPATCH(group_norm_backward)(a, parallel(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxext

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_group_norm, jaxext::forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<float>("epsilon")
                                  .Attr<int64_t>("groups")
                                  .Attr<bool>("has_scale")
                                  .Attr<bool>("has_bias"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_group_norm_backward, jaxext::backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("groups")
                                  .Attr<bool>("has_scale")
                                  .Attr<bool>("has_bias")
                                  .Attr<bool>("wants_dx")
                                  .Attr<bool>("wants_dscale")
                                  .Attr<bool>("wants_dbias"));
#endif  // JAXEXT_HANDLER
