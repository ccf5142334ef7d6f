// cumsum, cumprod, cummax and cummin in one reading, where XLA makes several. Sums of float32 are XLA's to the bit; those of
// bfloat16, and products of floats, are carried in double precision; those of integers wrap around.
#include "cpu/cumulative.h"

#ifdef JAXEXT_KERNEL
#include "cpu/cumulative_logsumexp.h"
#include "cpu/cumulative_sum.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kTaskElements = 1 << 15;  // of a task, at least

JAXEXT_INLINE int32_t widened(int32_t x) { return x; }
JAXEXT_INLINE uint32_t widened(uint32_t x) { return x; }
JAXEXT_INLINE void put(int32_t* p, int32_t x) { *p = x; }
JAXEXT_INLINE void put(uint32_t* p, uint32_t x) { *p = x; }

struct Sum {
  typedef double Carry;
  static constexpr double kNeutral = 0;
  static JAXEXT_INLINE double step(double a, double b) { return a + b; }
};
struct Product {
  typedef double Carry;
  static constexpr double kNeutral = 1;
  static JAXEXT_INLINE double step(double a, double b) { return a * b; }
};
// As XLA's maximum and minimum: NaN wins, and +0 is above -0.
struct Max {
  typedef float Carry;
  static constexpr float kNeutral = -__builtin_inff();
  static JAXEXT_INLINE float step(float a, float b) {
    return a != a ? a : b != b ? b : a == b ? (__builtin_signbit(a) ? b : a) : a > b ? a : b;
  }
};
struct Min {
  typedef float Carry;
  static constexpr float kNeutral = __builtin_inff();
  static JAXEXT_INLINE float step(float a, float b) {
    return a != a ? a : b != b ? b : a == b ? (__builtin_signbit(a) ? a : b) : a < b ? a : b;
  }
};

struct WholeSum {
  typedef uint32_t Carry;
  static constexpr uint32_t kNeutral = 0;
  static JAXEXT_INLINE uint32_t step(uint32_t a, uint32_t b) { return a + b; }
};
struct WholeProduct {
  typedef uint32_t Carry;
  static constexpr uint32_t kNeutral = 1;
  static JAXEXT_INLINE uint32_t step(uint32_t a, uint32_t b) { return a * b; }
};
template <class T>
struct WholeMax {
  typedef T Carry;
  static constexpr T kNeutral = (T)-1 > 0 ? (T)0 : (T)INT32_MIN;
  static JAXEXT_INLINE T step(T a, T b) { return a > b ? a : b; }
};
template <class T>
struct WholeMin {
  typedef T Carry;
  static constexpr T kNeutral = (T)-1 > 0 ? (T)UINT32_MAX : (T)INT32_MAX;
  static JAXEXT_INLINE T step(T a, T b) { return a < b ? a : b; }
};

// Elements [first, last) of a row in scan order; returns the carry behind them. Where `out` is null only that is wanted.
template <class F, class T, bool kReverse>
typename F::Carry run(const T* x, int64_t n, int64_t first, int64_t last, typename F::Carry carry, T* out) {
  for (int64_t i = first; i < last; i++) {
    const int64_t at = kReverse ? n - 1 - i : i;
    carry = F::step(carry, (typename F::Carry)widened(x[at]));
    if (out) put(out + at, carry);
  }
  return carry;
}

template <class F, class T, bool kReverse>
void along_rows(const CumulativeArgs& a, const Parallel& par) {
  typedef typename F::Carry Carry;
  const auto* x = static_cast<const T*>(a.x);
  auto* out = static_cast<T*>(a.out);
  if (!threads_share_rows(a, par)) {
    parallel_rows(par, a.outer, a.n, kTaskElements, [&](int64_t first, int64_t end) {
      for (int64_t r = first; r < end; r++)
        run<F, T, kReverse>(x + r * a.n, a.n, 0, a.n, (Carry)F::kNeutral, out + r * a.n);
    });
    return;
  }
  // Reduce each part, scan the parts' results, scan each part: one more reading, shared by all threads.
  const int64_t parts = par.threads, size = (a.n + parts - 1) / parts;
  auto* carries = static_cast<Carry*>(thread_arena(a.outer * parts * sizeof(Carry)));
  auto end_of = [&](int64_t part) { return (part + 1) * size < a.n ? (part + 1) * size : a.n; };
  parallel_for(par, a.outer * parts, [&](int64_t task) {
    const int64_t r = task / parts, part = task % parts;
    carries[task] =
        run<F, T, kReverse>(x + r * a.n, a.n, part * size, end_of(part), (Carry)F::kNeutral, static_cast<T*>(nullptr));
  });
  for (int64_t r = 0; r < a.outer; r++) {
    Carry before = (Carry)F::kNeutral;
    for (int64_t part = 0; part < parts; part++) {
      const Carry own = carries[r * parts + part];
      carries[r * parts + part] = before;
      before = F::step(before, own);
    }
  }
  parallel_for(par, a.outer * parts, [&](int64_t task) {
    const int64_t r = task / parts, part = task % parts;
    run<F, T, kReverse>(x + r * a.n, a.n, part * size, end_of(part), carries[task], out + r * a.n);
  });
}

template <class F, class T, bool kReverse>
void along_columns(const CumulativeArgs& a, const Parallel& par) {
  typedef typename F::Carry Carry;
  parallel_columns(a, par, [&](int64_t begin, int64_t width) {
    const auto* x = static_cast<const T*>(a.x) + begin;
    auto* out = static_cast<T*>(a.out) + begin;
    Carry carry[kColumns];
    for (auto& c : carry) c = (Carry)F::kNeutral;
    for (int64_t i = 0; i < a.n; i++) {
      const int64_t at = (kReverse ? a.n - 1 - i : i) * a.inner;
      if (width == kColumns)  // a constant bound: whole registers
        for (int64_t c = 0; c < kColumns; c++) {
          carry[c] = F::step(carry[c], (Carry)widened(x[at + c]));
          put(out + at + c, carry[c]);
        }
      else
        for (int64_t c = 0; c < width; c++) {
          carry[c] = F::step(carry[c], (Carry)widened(x[at + c]));
          put(out + at + c, carry[c]);
        }
    }
  });
}

template <class F, class T>
void of_type(const CumulativeArgs& a, const Parallel& par) {
  if (a.inner == 1) return a.reverse ? along_rows<F, T, true>(a, par) : along_rows<F, T, false>(a, par);
  a.reverse ? along_columns<F, T, true>(a, par) : along_columns<F, T, false>(a, par);
}

template <class F>
void of_floats(const CumulativeArgs& a, const Parallel& par) {
  a.type == Element::bf16 ? of_type<F, bf16>(a, par) : of_type<F, float>(a, par);
}

template <template <class> class F>
void of_whole(const CumulativeArgs& a, const Parallel& par) {
  a.type == Element::i32 ? of_type<F<int32_t>, int32_t>(a, par) : of_type<F<uint32_t>, uint32_t>(a, par);
}

}  // namespace

void cumulative(const CumulativeArgs& a, const Parallel& par) {
  const bool whole = a.type == Element::i32 || a.type == Element::u32;
  switch (a.kind) {
    case CumulativeKind::sum:
      if (whole) return of_type<WholeSum, uint32_t>(a, par);
      return a.type == Element::bf16 ? of_type<Sum, bf16>(a, par) : sum_of_floats(a, par);
    case CumulativeKind::prod: return whole ? of_type<WholeProduct, uint32_t>(a, par) : of_floats<Product>(a, par);
    case CumulativeKind::max: return whole ? of_whole<WholeMax>(a, par) : of_floats<Max>(a, par);
    case CumulativeKind::min: return whole ? of_whole<WholeMin>(a, par) : of_floats<Min>(a, par);
    case CumulativeKind::logsumexp: return logsumexp(a, par);
  }
}

}  // namespace jaxext::JAXEXT_ISA
#endif

#ifdef JAXEXT_HANDLER
#include "ffi.h"

JAXEXT_DECLARE(cumulative, CumulativeArgs)

namespace jaxext {
namespace {

ffi::Error cumulative_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out, int64_t axis,
                              int64_t kind, bool reverse) {
  const auto dims = x.dimensions(), shape = out->dimensions();
  axis += dims.size();
  Element type{};
  const bool whole = x.element_type() == ffi::DataType::S32 || x.element_type() == ffi::DataType::U32;
  if (!element_of(x.element_type(), type) || !(whole || is_float(x.element_type())))
    return bad_argument("cumulative", "x", "an array of float32, bfloat16, int32 or uint32");
  if (axis < 0 || axis >= (int64_t)dims.size())
    return bad_argument("cumulative", "axis", "counted from the end, one of x's, x being " + shape_text(dims));
  if (out->element_type() != x.element_type() || !same_shape(shape, dims))
    return bad_argument("cumulative", "out", "of x's shape and type, x being " + shape_text(dims));
  if (kind < 0 || kind > (whole ? 3 : 4))
    return bad_argument("cumulative", "kind", "0 (sum), 1 (prod), 2 (max), 3 (min) or, of floats, 4 (logsumexp)");
  CumulativeArgs a{x.untyped_data(),
                   out->untyped_data(),
                   product(dims, 0, axis),
                   dims[axis],
                   product(dims, axis + 1, dims.size()),
                   static_cast<CumulativeKind>(kind),
                   type,
                   reverse};
  if (a.outer > 0 && a.n > 0 && a.inner > 0) JAXEXT_DISPATCH(cumulative)(a, parallel(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxext

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_cumulative, jaxext::cumulative_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("axis")
                                  .Attr<int64_t>("kind")
                                  .Attr<bool>("reverse"));
#endif  // JAXEXT_HANDLER
