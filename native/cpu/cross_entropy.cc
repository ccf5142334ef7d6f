// Softmax cross-entropy of rows of logits, forward and backward, in f32 whatever the storage.
//
// Forward reads a row once, in blocks that stay in the first-level cache: the block's maximum, then its exponentials
// against the running maximum. Backward reads it once and writes the gradient. Of few classes many rows are read together.
#include "cross_entropy.h"

#ifdef JAXEXT_KERNEL
#include "log_onto.h"
#include "rows.h"

namespace jaxext::JAXEXT_ISA {
namespace {

#define JAXEXT_BODY [&](int64_t j, auto part, int k) __attribute__((always_inline))

constexpr float kLeast = -3.402823466e38f, kInfinity = __builtin_inff(), kNan = __builtin_nanf("");
constexpr int64_t kBlock = 1024;

// exp(t) for t <= 0 and NaN (exp(t) for 0 < t < 88 too): relative error below 5e-7 down to t = -20; 0 at -infinity.
// One multiplication rounds t*log2(e) to the nearest integer only; the fraction comes from a fused one.
JAXEXT_INLINE vf exp_shifted(vf t) {
  constexpr float kLog2e = 1.44269504f;
#if defined(__AVX512F__)
  t = (vf)_mm512_max_ps((__m512)splat(-110.f), (__m512)t);
#else
  const vi tiny = t < splat(-87.f);
  t = max(splat(-87.f), t);
#endif
  vf n = round_nearest(t * splat(kLog2e)), f = fma(t, splat(kLog2e), -n);
  vf p = splat(1.3264727e-3f);
  p = fma(p, f, splat(9.671513e-3f));
  p = fma(p, f, splat(5.5507336e-2f));
  p = fma(p, f, splat(2.4022242e-1f));
  p = fma(p, f, splat(6.93147e-1f));
  p = fma(p, f, splat(1.f));
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vf r = p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
  return select(tiny, splat(0.f), select(t != t, t, r));
#endif
}

JAXEXT_INLINE float exp_shifted_scalar(float t) { return exp_shifted(splat(t))[0]; }

JAXEXT_INLINE float value(LogitBuffer b, int64_t i) {
  if (!b.bf16) return static_cast<const float*>(b.data)[i];
  return load_first(static_cast<const bf16*>(b.data) + i, 1)[0];
}

JAXEXT_INLINE void set(LogitBuffer b, int64_t i, float x) {
  if (b.bf16) store_first(static_cast<bf16*>(b.data) + i, splat(x), 1);
  else static_cast<float*>(b.data)[i] = x;
}

template <class X>
bool has_nan(const X* x, int64_t n) {
  vi found = {};
  over_row(n, JAXEXT_BODY {
    vf v = part.get(x + j);
    found |= v != v;
  });
  for (int l = 0; l < kLanes; l++)
    if (found[l]) return true;
  return false;
}

template <class X>
int64_t count_of(const X* x, int64_t n, float wanted) {
  int64_t count = 0;
  over_row(n, JAXEXT_BODY {
    const vi found = part.get(x + j) == splat(wanted);
    for (int l = 0; l < kLanes; l++) count -= found[l];
  });
  return count;
}

// A row's running maximum and the sum of exponentials below it.
struct Normalizer {
  float max = kLeast, sum = 0.f;

  template <class X>
  JAXEXT_INLINE void add(const X* x, int64_t n) {
    vf top[4] = {splat(kLeast), splat(kLeast), splat(kLeast), splat(kLeast)};
    over_row(n, JAXEXT_BODY { top[k] = jaxext::JAXEXT_ISA::max(part.get(x + j, kLeast), top[k]); });
    using jaxext::JAXEXT_ISA::max;
    const float block = reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
    if (block > this->max) {
      sum *= exp_shifted_scalar(this->max - block);
      this->max = block;
    }
    Sums sums;
    const vf shift = splat(this->max);
    over_row(n, JAXEXT_BODY { sums.part[k] += exp_shifted(part.get(x + j, -kInfinity) - shift); });
    sum += sums.total();
  }
  JAXEXT_INLINE float log_sum() const { return __builtin_logf(sum); }

  // Maximum and log_sum, whose sum is infinite where a logit is, as jax.nn.logsumexp.
  template <class X>
  JAXEXT_INLINE void keep(const X* x, int64_t n, float* pair) const {
    const bool infinite = max == kInfinity;
    pair[0] = infinite && has_nan(x, n) ? kNan : max;
    pair[1] = infinite ? 0.f : log_sum();
  }
};

template <class X>
JAXEXT_INLINE float row_sum(const X* x, int64_t n) {
  Sums sums;
  over_row(n, JAXEXT_BODY { sums.part[k] += part.get(x + j); });
  return sums.total();
}

// The class a label names, or -1.
JAXEXT_INLINE int64_t class_of(const CrossEntropyArgs& a, int64_t i) {
  int64_t y = a.labels[i];
  if (y < 0 && !a.one_hot) y += a.classes;
  return y >= 0 && y < a.classes ? y : -1;
}

template <class X>
JAXEXT_INLINE float row_loss(const CrossEntropyArgs& a, int64_t i, const X* x, const Normalizer& normal, float all) {
  const int64_t y = class_of(a, i);
  const float smooth = a.smoothing, mean = all / static_cast<float>(a.classes);
  if (normal.max == kInfinity) {
    if (a.one_hot || y < 0) return kNan;
    const float total = a.normalizer[2 * i], plain = total - value(a.logits, i * a.classes + y);
    return smooth == 0.f ? plain : (1.f - smooth) * plain + smooth * (total - mean);
  }
  if (y < 0 && !a.one_hot) return kNan;
  const float log_sum = normal.log_sum();
  float loss = y < 0 ? 0.f : log_sum + (normal.max - value(a.logits, i * a.classes + y));
  if (smooth != 0.f) return (1.f - smooth) * loss + smooth * (log_sum + (normal.max - mean));
  if (!a.one_hot || all != -kInfinity) return loss;
  // A one-hot product multiplies every log-probability: an infinite one that is not the label's gives 0 * infinity.
  const int64_t own = y >= 0 && value(a.logits, i * a.classes + y) == -kInfinity;
  return count_of(x, a.classes, -kInfinity) > own ? kNan : loss;
}

template <class X>
void forward_rows(const CrossEntropyArgs& a, const Parallel& par) {
  const int64_t n = a.classes, step = kSerialElements / 2 / n + 1, tasks = (a.rows + step - 1) / step;
  const bool sums = a.one_hot || a.smoothing != 0.f;
  parallel_for(threads_for(par, a.rows * n), tasks, [&](int64_t task) {
    const int64_t end = (task + 1) * step < a.rows ? (task + 1) * step : a.rows;
    for (int64_t i = task * step; i < end; i++) {
      const X* x = static_cast<const X*>(a.logits.data) + i * n;
      Normalizer normal;
      float all = 0.f;
      for (int64_t j = 0; j < n; j += kBlock) {
        const int64_t count = n - j < kBlock ? n - j : kBlock;
        normal.add(x + j, count);
        if (sums) all += row_sum(x + j, count);
      }
      normal.keep(x, n, a.normalizer + 2 * i);
      set(a.loss, i, row_loss(a, i, x, normal, all));
    }
  });
}

template <class X>
void backward_rows(const CrossEntropyArgs& a, const Parallel& par) {
  const int64_t n = a.classes, step = kSerialElements / 2 / n + 1, tasks = (a.rows + step - 1) / step;
  const bool stream = past_caches(static_cast<const X*>(a.dlogits.data), a.rows, n);
  parallel_for(threads_for(par, a.rows * n), tasks, [&](int64_t task) {
    const int64_t end = (task + 1) * step < a.rows ? (task + 1) * step : a.rows;
    for (int64_t i = task * step; i < end; i++) {
      const X* x = static_cast<const X*>(a.logits.data) + i * n;
      X* dx = static_cast<X*>(a.dlogits.data) + i * n;
      const int64_t y = class_of(a, i);
      const float g = value(a.grad, i), sure = g * (1.f - a.smoothing);
      const float share = a.one_hot && y < 0 ? g * a.smoothing : g, even = -g * a.smoothing / static_cast<float>(n);
      const float top = a.normalizer[2 * i], below = a.normalizer[2 * i + 1];
      const vf shift = splat(top), sum = splat(below), slope = splat(share), offset = splat(even);
      // dx may be x itself: the label's own logit is read first.
      const float logit = y < 0 ? 0.f : value(a.logits, i * n + y);
      over_row(n, JAXEXT_BODY { part.put(dx + j, fma(exp_shifted(part.get(x + j) - shift - sum), slope, offset), stream); });
      finish_stores(stream);
      if (y < 0) continue;
      // Differences of probabilities first: next to 1 they are exact, and with one class 0.
      const float p = exp_shifted_scalar(logit - top - below);
      set(a.dlogits, i * n + y, (p - 1.f) * sure + (p - 1.f / static_cast<float>(n)) * (g * a.smoothing));
    }
  });
}

// Rows of few classes, kTogether at a time: the lanes are rows. What lies beyond the last row is zeros.
constexpr int64_t kFewClasses = 16, kTogether = 64;

struct Together {
  int64_t first, rows;
  alignas(64) float logits[kFewClasses][kTogether];
  alignas(64) int32_t classes[kTogether];

  Together(const CrossEntropyArgs& a, int64_t first) : first(first), rows(a.rows - first) {
    if (rows > kTogether) rows = kTogether;
    for (int64_t c = 0; c < a.classes; c++)
      for (int64_t r = 0; r < kTogether; r++)
        logits[c][r] = r < rows ? value(a.logits, (first + r) * a.classes + c) : 0.f;
    for (int64_t r = 0; r < kTogether; r++) classes[r] = r < rows ? static_cast<int32_t>(class_of(a, first + r)) : 0;
  }
  JAXEXT_INLINE vi class_at(int64_t l) const {
    vi y;
    memcpy(&y, classes + l, sizeof y);
    return y;
  }
};

// Tasks of whole groups of rows.
template <class Body>
void over_groups(const CrossEntropyArgs& a, const Parallel& par, const Body& body) {
  const int64_t groups = kSerialElements / 2 / a.classes / kTogether, rows = groups * kTogether;
  parallel_for(threads_for(par, a.rows * a.classes), (a.rows + rows - 1) / rows, [&](int64_t task) {
    for (int64_t i = task * rows; i < (task + 1) * rows && i < a.rows; i += kTogether) body(i);
  });
}

template <class X>
void forward_few(const CrossEntropyArgs& a, const Parallel& par) {
  over_groups(a, par, [&](int64_t first) {
    const Together group(a, first);
    alignas(64) float top[kTogether], sum[kTogether], below[kTogether], loss[kTogether];
    vi special = vi{} - (a.smoothing != 0.f);
    for (int64_t l = 0; l < kTogether; l += kLanes) {
      vf most = splat(kLeast), total = {}, own = {};
      const vi y = group.class_at(l);
      for (int64_t c = 0; c < a.classes; c++) most = max(load(group.logits[c] + l), most);
      for (int64_t c = 0; c < a.classes; c++) {
        const vf x = load(group.logits[c] + l);
        total += exp_shifted(x - most);
        own = select(y == static_cast<int32_t>(c), x, own);
        if (a.one_hot) special |= x == splat(-kInfinity);
      }
      special |= (most == splat(kInfinity)) | (y < 0);
      const vf log_sum = log_onto(vf{}, total);
      store(top + l, most), store(sum + l, total), store(below + l, log_sum);
      store(loss + l, log_sum + (most - own));
    }
    if (any(special)) {
      for (int64_t r = 0; r < group.rows; r++) {
        const X* x = static_cast<const X*>(a.logits.data) + (first + r) * a.classes;
        const Normalizer normal{top[r], sum[r]};
        normal.keep(x, a.classes, a.normalizer + 2 * (first + r));
        set(a.loss, first + r, row_loss(a, first + r, x, normal, row_sum(x, a.classes)));
      }
      return;
    }
    for (int64_t r = 0; r < group.rows; r++) {
      a.normalizer[2 * (first + r)] = top[r];
      a.normalizer[2 * (first + r) + 1] = below[r];
      set(a.loss, first + r, loss[r]);
    }
  });
}

void backward_few(const CrossEntropyArgs& a, const Parallel& par) {
  over_groups(a, par, [&](int64_t first) {
    Together group(a, first);  // dlogits may be the logits themselves
    alignas(64) float top[kTogether] = {}, below[kTogether] = {}, grad[kTogether] = {};
    for (int64_t r = 0; r < group.rows; r++) {
      top[r] = a.normalizer[2 * (first + r)], below[r] = a.normalizer[2 * (first + r) + 1];
      grad[r] = value(a.grad, first + r);
    }
    const vf each = splat(1.f / static_cast<float>(a.classes));
    for (int64_t l = 0; l < kTogether; l += kLanes) {
      const vi y = group.class_at(l);
      const vf g = load(grad + l), sure = g * splat(1.f - a.smoothing), spread = g * splat(a.smoothing);
      const vf share = a.one_hot ? select(y < 0, spread, g) : g;
      for (int64_t c = 0; c < a.classes; c++) {
        float* x = group.logits[c] + l;
        const vf p = exp_shifted(load(x) - load(top + l) - load(below + l));
        // Differences of probabilities first: next to 1 they are exact, and with one class 0.
        const vf own = (p - splat(1.f)) * sure + (p - each) * spread;
        store(x, select(y == static_cast<int32_t>(c), own, fma(p, share, -spread * each)));
      }
    }
    for (int64_t r = 0; r < group.rows; r++)
      for (int64_t c = 0; c < a.classes; c++) set(a.dlogits, (first + r) * a.classes + c, group.logits[c][r]);
  });
}

template <class X, class Y>
void target_forward_rows(const TargetCrossEntropyArgs& a, const Parallel& par) {
  const int64_t n = a.classes, step = kSerialElements / 2 / n + 1, tasks = (a.rows + step - 1) / step;
  parallel_for(threads_for(par, a.rows * n), tasks, [&](int64_t task) {
    const int64_t end = (task + 1) * step < a.rows ? (task + 1) * step : a.rows;
    for (int64_t i = task * step; i < end; i++) {
      const X* x = static_cast<const X*>(a.logits.data) + i * n;
      const Y* y = static_cast<const Y*>(a.targets.data) + i * n;
      Normalizer normal;
      float total = 0.f, product = 0.f, pivot = 0.f;
      for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t count = n - first < kBlock ? n - first : kBlock;
        normal.add(x + first, count);
        if (first == 0) pivot = normal.max > kLeast && normal.max < kInfinity ? normal.max : 0.f;
        Sums totals, products;
        over_row(count, JAXEXT_BODY {
          vf share = part.get(y + first + j);
          totals.part[k] += share;
          products.part[k] = fma(share, part.get(x + first + j, pivot) - splat(pivot), products.part[k]);
        });
        total += totals.total();
        product += products.total();
      }
      const bool infinite = normal.max == kInfinity;
      normal.keep(x, n, a.normalizer + 2 * i);
      a.total[i] = total;
      set(a.loss, i, infinite ? kNan : total * (normal.log_sum() + (normal.max - pivot)) - product);
    }
  });
}

template <class X, class Y>
void target_backward_rows(const TargetCrossEntropyArgs& a, const Parallel& par) {
  const int64_t n = a.classes, step = kSerialElements / 2 / n + 1, tasks = (a.rows + step - 1) / step;
  const bool stream = past_caches(static_cast<const X*>(a.dlogits.data), a.rows, n);
  const bool stream_targets = past_caches(static_cast<const Y*>(a.dtargets.data), a.rows, n);
  parallel_for(threads_for(par, a.rows * n), tasks, [&](int64_t task) {
    const int64_t end = (task + 1) * step < a.rows ? (task + 1) * step : a.rows;
    for (int64_t i = task * step; i < end; i++) {
      const X* x = static_cast<const X*>(a.logits.data) + i * n;
      const Y* y = static_cast<const Y*>(a.targets.data) + i * n;
      const vf g = splat(value(a.grad, i)), total = splat(a.total[i]);
      const vf shift = splat(a.normalizer[2 * i]), sum = splat(a.normalizer[2 * i + 1]);
      X* dx = a.dlogits.data ? static_cast<X*>(a.dlogits.data) + i * n : nullptr;
      Y* dy = a.dtargets.data ? static_cast<Y*>(a.dtargets.data) + i * n : nullptr;
      over_row(n, JAXEXT_BODY {
        vf t = part.get(x + j) - shift - sum;
        if (dx) part.put(dx + j, (exp_shifted(t) * total - part.get(y + j)) * g, stream);
        if (dy) part.put(dy + j, -t * g, stream_targets);
      });
    }
    finish_stores(stream || stream_targets);
  });
}

template <class X>
void target_forward_for(const TargetCrossEntropyArgs& a, const Parallel& par) {
  a.targets.bf16 ? target_forward_rows<X, bf16>(a, par) : target_forward_rows<X, float>(a, par);
}

template <class X>
void target_backward_for(const TargetCrossEntropyArgs& a, const Parallel& par) {
  a.targets.bf16 ? target_backward_rows<X, bf16>(a, par) : target_backward_rows<X, float>(a, par);
}

}  // namespace

void cross_entropy_forward(const CrossEntropyArgs& a, const Parallel& par) {
  if (a.classes <= kFewClasses) return a.logits.bf16 ? forward_few<bf16>(a, par) : forward_few<float>(a, par);
  a.logits.bf16 ? forward_rows<bf16>(a, par) : forward_rows<float>(a, par);
}
void cross_entropy_backward(const CrossEntropyArgs& a, const Parallel& par) {
  if (a.classes <= kFewClasses) return backward_few(a, par);
  a.logits.bf16 ? backward_rows<bf16>(a, par) : backward_rows<float>(a, par);
}
void target_cross_entropy_forward(const TargetCrossEntropyArgs& a, const Parallel& par) {
  a.logits.bf16 ? target_forward_for<bf16>(a, par) : target_forward_for<float>(a, par);
}
void target_cross_entropy_backward(const TargetCrossEntropyArgs& a, const Parallel& par) {
  a.logits.bf16 ? target_backward_for<bf16>(a, par) : target_backward_for<float>(a, par);
}

}  // namespace jaxext::JAXEXT_ISA
#endif  // JAXEXT_KERNEL

#ifdef JAXEXT_HANDLER
#include "logit_operands.h"

JAXEXT_DECLARE(cross_entropy_forward, CrossEntropyArgs)
JAXEXT_DECLARE(cross_entropy_backward, CrossEntropyArgs)
JAXEXT_DECLARE(target_cross_entropy_forward, TargetCrossEntropyArgs)
JAXEXT_DECLARE(target_cross_entropy_backward, TargetCrossEntropyArgs)

namespace jaxext {
namespace {

using Any = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

ffi::Error forward(ffi::ThreadPool pool, Any logits, Any labels, Result loss, Result normalizer, float label_smoothing,
                   bool one_hot) {
  CrossEntropyArgs a{};
  ffi::Error error = read_forward(logits, labels, loss, normalizer, label_smoothing, one_hot, a);
  if (error.success() && a.rows && a.classes) JAXEXT_DISPATCH(cross_entropy_forward)(a, parallel(pool));
  return error;
}

ffi::Error backward(ffi::ThreadPool pool, Any logits, Any labels, Any normalizer, Any grad, Result dlogits,
                    float label_smoothing, bool one_hot) {
  CrossEntropyArgs a{};
  ffi::Error error = read_backward(logits, labels, normalizer, grad, dlogits, label_smoothing, one_hot, a);
  if (error.success() && a.rows && a.classes) JAXEXT_DISPATCH(cross_entropy_backward)(a, parallel(pool));
  return error;
}

ffi::Error target_forward(ffi::ThreadPool pool, Any logits, Any targets, Result loss, Result normalizer, Result total) {
  LogitReader reader("target_cross_entropy", logits);
  TargetCrossEntropyArgs a{};
  a.logits = reader.read(logits, "logits", true);
  a.targets = reader.read(targets, "labels", true);
  a.loss = reader.read(*loss, "loss", false);
  a.normalizer = reader.pairs(*normalizer);
  a.total = reader.row<float>(*total, "total", ffi::DataType::F32);
  if (reader.error.failure()) return reader.error;
  a.rows = reader.rows(), a.classes = reader.classes();
  if (a.rows && a.classes) JAXEXT_DISPATCH(target_cross_entropy_forward)(a, parallel(pool));
  return ffi::Error::Success();
}

ffi::Error target_backward(ffi::ThreadPool pool, Any logits, Any targets, Any normalizer, Any total, Any grad,
                           ffi::RemainingRets rets, bool wants_dlogits, bool wants_dtargets) {
  LogitReader reader("target_cross_entropy_backward", logits);
  if (rets.size() != static_cast<size_t>(wants_dlogits) + wants_dtargets)
    return bad_argument(reader.op, "logits", "differentiated as the flags say");
  TargetCrossEntropyArgs a{};
  a.logits = reader.read(logits, "logits", true);
  a.targets = reader.read(targets, "labels", true);
  a.normalizer = reader.pairs(normalizer);
  a.total = reader.row<float>(total, "total", ffi::DataType::F32);
  a.grad = reader.read(grad, "grad", false);
  if (wants_dlogits) a.dlogits = reader.read(**rets.get<Any>(0), "dlogits", true);
  if (wants_dtargets) a.dtargets = reader.read(**rets.get<Any>(wants_dlogits), "dlabels", true);
  if (reader.error.failure()) return reader.error;
  if ((wants_dlogits && a.dlogits.bf16 != a.logits.bf16) || (wants_dtargets && a.dtargets.bf16 != a.targets.bf16))
    return bad_argument(reader.op, "dlogits", "of the logits' type, and dlabels of the labels'");
  a.rows = reader.rows(), a.classes = reader.classes();
  if (a.rows && a.classes) JAXEXT_DISPATCH(target_cross_entropy_backward)(a, parallel(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxext

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_cross_entropy, jaxext::forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("label_smoothing")
                                  .Attr<bool>("one_hot"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_cross_entropy_backward, jaxext::backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("label_smoothing")
                                  .Attr<bool>("one_hot"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_target_cross_entropy, jaxext::target_forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_target_cross_entropy_backward, jaxext::target_backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingRets()
                                  .Attr<bool>("wants_dlogits")
                                  .Attr<bool>("wants_dtargets"));
#endif  // JAXEXT_HANDLER
