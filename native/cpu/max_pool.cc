// max_pool: a register of neighbouring channels at a time. The gradient goes to the element that XLA's pass over the
// window ends with: one that is not >= what comes after it gives way, so the first of equal ones is chosen and a NaN never
// lasts. Padding is -infinity that takes part. Windows are taken in order, so that sums of several gradients are rounded
// as stock's are.
#include "cpu/max_pool.h"

#ifdef JAXEXT_KERNEL
#include "cpu/rows.h"

namespace jaxext::JAXEXT_ISA {
namespace {

#define JAXEXT_BODY [&](int64_t j, auto part, int) __attribute__((always_inline))

constexpr int64_t kTaskElements = 1 << 14;  // of a task, at least
constexpr float kLeast = -__builtin_inff();

// Where a window's elements are, counted from the image; kOutside: padding.
constexpr int64_t kOutside = -1;
JAXEXT_INLINE void find(const MaxPoolArgs& a, int64_t row, int64_t column, int64_t* places) {
  const int64_t top = row * a.rows.stride - a.rows.before, left = column * a.columns.stride - a.columns.before;
  for (int64_t i = top; i < top + a.rows.window; i++)
    for (int64_t j = left; j < left + a.columns.window; j++) {
      const bool inside = i >= 0 && i < a.rows.in && j >= 0 && j < a.columns.in;
      *places++ = inside ? (i * a.columns.in + j) * a.inner : kOutside;
    }
}

// The number of the element that a gradient goes to, of each lane.
template <class T, class Part>
JAXEXT_INLINE vi chosen(const T* x, const int64_t* places, int64_t n, Part part) {
  vf best = places[0] == kOutside ? splat(kLeast) : part.get(x + places[0]);
  vi at = {};
  for (int64_t k = 1; k < n; k++) {
    const vf next = places[k] == kOutside ? splat(kLeast) : part.get(x + places[k]);
    const vi stays = best >= next;
    best = select(stays, best, next);
    at = stays ? at : splat_i((int32_t)k);
  }
  return at;
}

// Rows [first, last) of an image's gradient, from all windows that touch them.
template <class T>
void gradient_rows(const MaxPoolArgs& a, int64_t image, int64_t first, int64_t last, int64_t* places) {
  const int64_t size = a.columns.in * a.inner, n = a.rows.window * a.columns.window;
  const T* x = static_cast<const T*>(a.x) + image * a.rows.in * size;
  const T* gradient = static_cast<const T*>(a.gradient) + image * a.rows.out * a.columns.out * a.inner;
  T* out = static_cast<T*>(a.out) + image * a.rows.in * size;
  int64_t cleared = first;
  for (int64_t r = 0; r < a.rows.out; r++) {
    const int64_t top = r * a.rows.stride - a.rows.before, bottom = top + a.rows.window;
    if (bottom <= first || top >= last) continue;
    const int64_t reached = bottom < last ? bottom : last;
    if (reached > cleared) {
      memset(out + cleared * size, 0, (reached - cleared) * size * sizeof(T));
      cleared = reached;
    }
    for (int64_t c = 0; c < a.columns.out; c++) {
      find(a, r, c, places);
      const T* given = gradient + (r * a.columns.out + c) * a.inner;
      over_row(a.inner, JAXEXT_BODY {
        const vi at = chosen(x + j, places, n, part);
        const vf g = part.get(given + j);
        for (int64_t k = 0; k < n; k++) {
          if (places[k] < first * size || places[k] >= last * size) continue;
          T* p = out + places[k] + j;
          part.put(p, part.get(p) + select(at == splat_i((int32_t)k), g, vf{}));
        }
      });
    }
  }
  memset(out + cleared * size, 0, (last - cleared) * size * sizeof(T));
}

template <class T>
void gradient_of(const MaxPoolArgs& a, const Parallel& par) {
  const int64_t size = a.columns.in * a.inner;
  // Windows over the border of two tasks are looked at twice: tasks are eight windows tall at least.
  int64_t rows = kTaskElements / size + 1, least = 8 * a.rows.window;
  rows = rows < least ? least : rows;
  rows = rows < a.rows.in ? rows : a.rows.in;
  const int64_t tasks = (a.rows.in + rows - 1) / rows;
  parallel_for(threads_for(par, a.batch * a.rows.in * size), a.batch * tasks, [&](int64_t task) {
    auto* places = static_cast<int64_t*>(thread_arena(a.rows.window * a.columns.window * sizeof(int64_t)));
    const int64_t first = task % tasks * rows, last = first + rows < a.rows.in ? first + rows : a.rows.in;
    gradient_rows<T>(a, task / tasks, first, last, places);
  });
}

template <class T>
void forward_of(const MaxPoolArgs& a, const Parallel& par) {
  const int64_t size = a.columns.in * a.inner, n = a.rows.window * a.columns.window;
  const int64_t rows = kTaskElements / (a.columns.out * a.inner) + 1, tasks = (a.rows.out + rows - 1) / rows;
  parallel_for(threads_for(par, a.batch * a.rows.in * size), a.batch * tasks, [&](int64_t task) {
    auto* places = static_cast<int64_t*>(thread_arena(n * sizeof(int64_t)));
    const int64_t image = task / tasks, first = task % tasks * rows;
    const int64_t last = first + rows < a.rows.out ? first + rows : a.rows.out;
    const T* x = static_cast<const T*>(a.x) + image * a.rows.in * size;
    T* out = static_cast<T*>(a.out) + (image * a.rows.out + first) * a.columns.out * a.inner;
    for (int64_t r = first; r < last; r++)
      for (int64_t c = 0; c < a.columns.out; c++, out += a.inner) {
        find(a, r, c, places);
        over_row(a.inner, JAXEXT_BODY {
          vf best = splat(kLeast);
          for (int64_t k = 0; k < n; k++)
            if (places[k] != kOutside) best = larger(best, part.get(x + places[k] + j));
          part.put(out + j, best);
        });
      }
  });
}

template <class T>
void of_type(const MaxPoolArgs& a, const Parallel& par) {
  a.gradient ? gradient_of<T>(a, par) : forward_of<T>(a, par);
}

}  // namespace

void max_pool(const MaxPoolArgs& a, const Parallel& par) {
  a.bf16 ? of_type<bf16>(a, par) : of_type<float>(a, par);
}

}  // namespace jaxext::JAXEXT_ISA
#endif

#ifdef JAXEXT_HANDLER
#include "ffi.h"

JAXEXT_DECLARE(max_pool, MaxPoolArgs)

namespace jaxext {
namespace {

typedef ffi::Span<const int64_t> Sizes;

// x: [..., one or two windowed dimensions, `trailing` more]; the attributes have an entry a windowed dimension.
bool windowed(Sizes x, Sizes out, Sizes window, Sizes stride, Sizes before, int64_t trailing, MaxPoolArgs& a) {
  const int64_t windows = window.size(), leading = static_cast<int64_t>(x.size()) - windows - trailing;
  if (windows < 1 || windows > 2 || stride.size() != window.size() || before.size() != window.size()) return false;
  if (trailing < 0 || leading < 0 || x.size() != out.size()) return false;
  WindowedDimension found[2] = {{1, 1, 1, 1, 0}, {1, 1, 1, 1, 0}};
  for (int64_t d = 0; d < static_cast<int64_t>(x.size()); d++) {
    const int64_t w = d - leading;
    if (w < 0 || w >= windows) {
      if (x[d] != out[d]) return false;
    } else if (window[w] < 1 || stride[w] < 1 || before[w] < 0) {
      return false;
    } else {
      found[2 - windows + w] = {x[d], out[d], window[w], stride[w], before[w]};
    }
  }
  a.rows = found[0];
  a.columns = found[1];
  a.batch = product(x, 0, leading);
  a.inner = product(x, leading + windows, x.size());
  return true;
}

ffi::Error run(const char* name, ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::AnyBuffer pooled, Sizes window,
               Sizes stride, Sizes before, int64_t trailing, MaxPoolArgs a) {
  if (!is_float(x.element_type())) return bad_argument(name, "x", "an array of float32 or bfloat16");
  if (pooled.element_type() != x.element_type() ||
      !windowed(x.dimensions(), pooled.dimensions(), window, stride, before, trailing, a))
    return bad_argument(name, "window", "of one or two dimensions, and what is pooled of x's type and other dimensions" +
                                            (", x being " + shape_text(x.dimensions())));
  a.bf16 = x.element_type() == ffi::DataType::BF16;
  const bool pools = pooled.element_count() > 0 || (a.gradient && x.element_count() > 0);
  if (pools) JAXEXT_DISPATCH(max_pool)(a, parallel(pool));
  return ffi::Error::Success();
}

ffi::Error max_pool_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out, Sizes window,
                            Sizes stride, Sizes before, int64_t trailing) {
  MaxPoolArgs a{};
  a.x = x.untyped_data();
  a.out = out->untyped_data();
  return run("max_pool", pool, x, *out, window, stride, before, trailing, a);
}

ffi::Error max_pool_gradient_handler(ffi::ThreadPool pool, ffi::AnyBuffer gradient, ffi::AnyBuffer x,
                                     ffi::Result<ffi::AnyBuffer> out, Sizes window, Sizes stride, Sizes before,
                                     int64_t trailing) {
  if (out->element_type() != x.element_type() || !same_shape(out->dimensions(), x.dimensions()))
    return bad_argument("max_pool_gradient", "out", "of x's shape and type, x being " + shape_text(x.dimensions()));
  MaxPoolArgs a{};
  a.x = x.untyped_data();
  a.gradient = gradient.untyped_data();
  a.out = out->untyped_data();
  return run("max_pool_gradient", pool, x, gradient, window, stride, before, trailing, a);
}

}  // namespace
}  // namespace jaxext

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_max_pool, jaxext::max_pool_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<xla::ffi::Span<const int64_t>>("window")
                                  .Attr<xla::ffi::Span<const int64_t>>("strides")
                                  .Attr<xla::ffi::Span<const int64_t>>("before")
                                  .Attr<int64_t>("trailing"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_max_pool_gradient, jaxext::max_pool_gradient_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<xla::ffi::Span<const int64_t>>("window")
                                  .Attr<xla::ffi::Span<const int64_t>>("strides")
                                  .Attr<xla::ffi::Span<const int64_t>>("before")
                                  .Attr<int64_t>("trailing"));
#endif  // JAXEXT_HANDLER
