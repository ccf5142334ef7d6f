// Layer and RMS normalisation, forward and backward, with f32 statistics.
//
// Forward reads x once and writes the result; backward reads x and the cotangent once and writes dx. The gradients of
// scale and bias are summed over fixed chunks of rows and the chunks added in order, so they do not depend on threads.
#include "norm.h"

#ifdef JAXEXT_KERNEL
#include "norm_parameters.h"

namespace jaxext::JAXEXT_ISA {
namespace {

struct Statistics {
  float mean, rstd;
};

template <bool kCentred, class X>
JAXEXT_INLINE Statistics row_statistics(const X* x, int64_t n, float epsilon) {
  float mean = 0.f;
  if constexpr (kCentred) {
    Sums sum;
    over_row(n, JAXEXT_BODY { sum.part[k] += part.get(x + j); });
    mean = sum.total() / static_cast<float>(n);
  }
  Sums squares;
  over_row(n, JAXEXT_BODY {
    vf d = part.get(x + j, mean) - splat(mean);
    squares.part[k] = fma(d, d, squares.part[k]);
  });
  return {mean, 1.f / __builtin_sqrtf(squares.total() / static_cast<float>(n) + epsilon)};
}

template <bool kCentred, class X, class O>
void forward_rows(const NormForwardArgs& a, const Parallel& par) {
  const int64_t n = a.features;
  float* scale = static_cast<float*>(thread_arena(2 * n * sizeof(float)));
  float* bias = scale + n;
  widen_parameter(a.scale, n, a.scale_offset, 1.f + a.scale_offset, scale);
  widen_parameter(a.bias, n, 0.f, 0.f, bias);
  const bool stream = past_caches(static_cast<const O*>(a.out.data), a.rows, n);
  const int64_t step = kSerialElements / 2 / n + 1, tasks = (a.rows + step - 1) / step;
  parallel_for(threads_for(par, a.rows * n), tasks, [&](int64_t task) {
    const int64_t end = (task + 1) * step < a.rows ? (task + 1) * step : a.rows;
    for (int64_t i = task * step; i < end; i++) {
      const X* x = static_cast<const X*>(a.x.data) + i * n;
      O* out = static_cast<O*>(a.out.data) + i * n;
      if (a.residual.data) {
        const X* residual = static_cast<const X*>(a.residual.data) + i * n;
        X* sum = static_cast<X*>(a.sum.data) + i * n;
        over_row(n, JAXEXT_BODY { part.put(sum + j, part.get(x + j) + part.get(residual + j)); });
        x = sum;
      }
      const X* next = static_cast<const X*>(a.x.data) + (i + 1) * n;
      const Statistics s = row_statistics<kCentred>(x, n, a.epsilon);
      over_row(n, JAXEXT_BODY {
        prefetch(next + j);
        vf normal = (part.get(x + j) - splat(s.mean)) * splat(s.rstd);
        part.put(out + j, fma(normal, part.get(scale + j), part.get(bias + j)), stream);
      });
      if (kCentred) a.mean[i] = s.mean;
      a.rstd[i] = s.rstd;
    }
    finish_stores(stream);
  });
}

// Rows that share one partial sum of dscale and dbias: a function of the shape alone.
int64_t rows_per_chunk(int64_t rows, int64_t n) {
  int64_t least = 16384 / n > 4 ? 16384 / n : 4, even = (rows + 127) / 128;
  return least > even ? least : even;
}

template <bool kCentred, bool kSums, class X, class O>
JAXEXT_INLINE void backward_row(const NormBackwardArgs& a, int64_t i, const float* scale, float* dscale, float* dbias,
                                bool stream) {
  const int64_t n = a.features;
  const X* x = static_cast<const X*>(a.x.data) + i * n;
  const O* grad = static_cast<const O*>(a.grad.data) + i * n;
  const vf mean = splat(kCentred ? a.mean[i] : 0.f), rstd = splat(a.rstd[i]);
  Sums along, total;
  over_row(n, JAXEXT_BODY {
    vf g = part.get(grad + j), normal = (part.get(x + j) - mean) * rstd, scaled = g * part.get(scale + j);
    along.part[k] = fma(scaled, normal, along.part[k]);
    if constexpr (kCentred) total.part[k] += scaled;
    if constexpr (kSums) {
      part.put(dscale + j, fma(g, normal, part.get(dscale + j)));
      if (dbias) part.put(dbias + j, g + part.get(dbias + j));
    }
  });
  if (!a.dx.data) return;
  const float share = 1.f / static_cast<float>(n);
  const vf slope = splat(along.total() * share), shift = splat(kCentred ? total.total() * share : 0.f);
  X* dx = static_cast<X*>(a.dx.data) + i * n;
  const X* grad_sum = a.grad_sum.data ? static_cast<const X*>(a.grad_sum.data) + i * n : nullptr;
  over_row(n, JAXEXT_BODY {
    prefetch(x + n + j);
    prefetch(grad + n + j);
    vf normal = (part.get(x + j) - mean) * rstd, scaled = part.get(grad + j) * part.get(scale + j);
    vf d = rstd * (scaled - shift - normal * slope);
    if (grad_sum) d += part.get(grad_sum + j);
    part.put(dx + j, d, stream);
  });
}

template <bool kCentred, class X, class O>
void backward_rows(const NormBackwardArgs& a, const Parallel& par) {
  const int64_t n = a.features, step = rows_per_chunk(a.rows, n), chunks = (a.rows + step - 1) / step;
  const bool sums = a.dscale.data || a.dbias.data, stream = past_caches(static_cast<const X*>(a.dx.data), a.rows, n);
  const int64_t stride = sums ? 2 * n : 0;
  float* scale = static_cast<float*>(thread_arena((n + chunks * stride) * sizeof(float)));
  float* partials = scale + n;
  widen_parameter(a.scale, n, a.scale_offset, 1.f + a.scale_offset, scale);
  parallel_for(threads_for(par, a.rows * n), chunks, [&](int64_t c) {
    float* dscale = partials + c * stride;
    float* dbias = a.dbias.data ? dscale + n : nullptr;
    __builtin_memset(dscale, 0, stride * sizeof(float));
    const int64_t end = (c + 1) * step < a.rows ? (c + 1) * step : a.rows;
    for (int64_t i = c * step; i < end; i++) {
      if (sums) backward_row<kCentred, true, X, O>(a, i, scale, dscale, dbias, stream);
      else backward_row<kCentred, false, X, O>(a, i, scale, nullptr, nullptr, stream);
    }
    finish_stores(stream);
  });
  add_chunks_to(a.dscale, partials, chunks, stride, n, par);
  add_chunks_to(a.dbias, partials + n, chunks, stride, n, par);
}

template <bool kCentred, class X>
void forward_for(const NormForwardArgs& a, const Parallel& par) {
  a.out.bf16 ? forward_rows<kCentred, X, bf16>(a, par) : forward_rows<kCentred, X, float>(a, par);
}

template <bool kCentred, class X>
void backward_for(const NormBackwardArgs& a, const Parallel& par) {
  a.grad.bf16 ? backward_rows<kCentred, X, bf16>(a, par) : backward_rows<kCentred, X, float>(a, par);
}

}  // namespace

void layer_norm_forward(const NormForwardArgs& a, const Parallel& par) {
  a.x.bf16 ? forward_for<true, bf16>(a, par) : forward_for<true, float>(a, par);
}
void rms_norm_forward(const NormForwardArgs& a, const Parallel& par) {
  a.x.bf16 ? forward_for<false, bf16>(a, par) : forward_for<false, float>(a, par);
}
void layer_norm_backward(const NormBackwardArgs& a, const Parallel& par) {
  a.x.bf16 ? backward_for<true, bf16>(a, par) : backward_for<true, float>(a, par);
}
void rms_norm_backward(const NormBackwardArgs& a, const Parallel& par) {
  a.x.bf16 ? backward_for<false, bf16>(a, par) : backward_for<false, float>(a, par);
}

}  // namespace jaxext::JAXEXT_ISA
#endif  // JAXEXT_KERNEL

#ifdef JAXEXT_HANDLER
#include "norm_operands.h"

JAXEXT_DECLARE(layer_norm_forward, NormForwardArgs)
JAXEXT_DECLARE(rms_norm_forward, NormForwardArgs)
JAXEXT_DECLARE(layer_norm_backward, NormBackwardArgs)
JAXEXT_DECLARE(rms_norm_backward, NormBackwardArgs)

namespace jaxext {
namespace {

template <bool kCentred>
ffi::Error forward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, float epsilon,
                   float scale_offset, bool has_residual, bool has_scale, bool has_bias) {
  NormForwardArgs a{};
  a.epsilon = epsilon;
  a.scale_offset = scale_offset;
  ffi::Error error = read_norm_forward<kCentred>(args, rets, has_residual, has_scale, has_bias, a);
  if (error.failure()) return error;
  if (a.rows == 0 || a.features == 0) return ffi::Error::Success();
  const Parallel par = parallel(pool);
  if (kCentred) JAXEXT_DISPATCH(layer_norm_forward)(a, par);
  else JAXEXT_DISPATCH(rms_norm_forward)(a, par);
  return ffi::Error::Success();
}

template <bool kCentred>
ffi::Error backward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, float scale_offset,
                    bool has_scale, bool has_bias, bool has_grad_sum, bool wants_dx, bool wants_dscale,
                    bool wants_dbias) {
  NormBackwardArgs a{};
  a.scale_offset = scale_offset;
  ffi::Error error = read_norm_backward<kCentred>(args, rets, has_scale, has_bias, has_grad_sum, wants_dx,
                                                  wants_dscale, wants_dbias, 0, a);
  if (error.failure()) return error;
  if (a.features == 0) return ffi::Error::Success();
  const Parallel par = parallel(pool);
  if (kCentred) JAXEXT_DISPATCH(layer_norm_backward)(a, par);
  else JAXEXT_DISPATCH(rms_norm_backward)(a, par);
  return ffi::Error::Success();
}

#define JAXEXT_FORWARD_BINDING   \
  xla::ffi::Ffi::Bind()             \
      .Ctx<xla::ffi::ThreadPool>()    \
      .RemainingArgs()           \
      .RemainingRets()           \
      .Attr<float>("epsilon")    \
      .Attr<float>("scale_offset") \
      .Attr<bool>("has_residual") \
      .Attr<bool>("has_scale")   \
      .Attr<bool>("has_bias")
#define JAXEXT_BACKWARD_BINDING  \
  xla::ffi::Ffi::Bind()             \
      .Ctx<xla::ffi::ThreadPool>()    \
      .RemainingArgs()           \
      .RemainingRets()           \
      .Attr<float>("scale_offset") \
      .Attr<bool>("has_scale")   \
      .Attr<bool>("has_bias")    \
      .Attr<bool>("has_grad_sum") \
      .Attr<bool>("wants_dx")    \
      .Attr<bool>("wants_dscale") \
      .Attr<bool>("wants_dbias")

}  // namespace
}  // namespace jaxext

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_layer_norm, jaxext::forward<true>, JAXEXT_FORWARD_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_rms_norm, jaxext::forward<false>, JAXEXT_FORWARD_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_layer_norm_backward, jaxext::backward<true>, JAXEXT_BACKWARD_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_rms_norm_backward, jaxext::backward<false>, JAXEXT_BACKWARD_BINDING);
#endif  // JAXEXT_HANDLER
