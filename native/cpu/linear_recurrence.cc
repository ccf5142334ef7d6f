// First-order linear recurrences, forward and backward (the same recurrence from the last step to the first).
//
// One pass over memory: what is carried from step to step stays in the first cache. It is carried in double precision, so
// that as many roundings as there are steps are no less exact than the logarithm of them in a tree.
#include "linear_recurrence.h"

#ifdef JAXEXT_KERNEL
#include "rows.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kColumns = 256;

// Reads or writes one step's columns as floats: where they lie, or through a buffer.
struct Buffer {
  float row[kColumns];
};
JAXEXT_INLINE const float* widened(const float* from, int64_t, Buffer&) { return from; }
JAXEXT_INLINE const float* widened(const bf16* from, int64_t n, Buffer& to) {
  over_row(n, [&](int64_t j, auto part, int) __attribute__((always_inline)) { part.put(to.row + j, part.get(from + j)); });
  return to.row;
}
JAXEXT_INLINE float* written(float* to, Buffer&) { return to; }
JAXEXT_INLINE float* written(bf16*, Buffer& buffer) { return buffer.row; }
JAXEXT_INLINE void finish(float*, int64_t, const Buffer&) {}
JAXEXT_INLINE void finish(bf16* to, int64_t n, const Buffer& from) {
  over_row(n, [&](int64_t j, auto part, int) __attribute__((always_inline)) { part.put(to + j, part.get(from.row + j)); });
}

// carry = a carry + b, and its rounded form.
JAXEXT_INLINE void advance(double* __restrict carry, const float* __restrict a, const float* __restrict b,
                           float* __restrict h, int64_t n) {
  for (int64_t j = 0; j < n; j++) {
    carry[j] = a[j] * carry[j] + b[j];
    h[j] = static_cast<float>(carry[j]);
  }
}

// task(first element of the first step, columns) for every block of columns.
template <class Task>
void over_columns(const Parallel& all, int64_t outer, int64_t steps, int64_t inner, const Task& task) {
  const int64_t blocks = (inner + kColumns - 1) / kColumns;
  parallel_for(threads_for(all, outer * steps * inner), outer * blocks, [&](int64_t i) {
    const int64_t first = i % blocks * kColumns, rest = inner - first;
    task(i / blocks * steps * inner + first, rest < kColumns ? rest : kColumns);
  });
}

template <class T>
void forward(const LinearRecurrenceArgs& r, const Parallel& par) {
  const T *a = static_cast<const T*>(r.a), *b = static_cast<const T*>(r.b);
  T* h = static_cast<T*>(r.h);
  over_columns(par, r.outer, r.steps, r.inner, [&](int64_t at, int64_t n) {
    double carry[kColumns] = {};
    Buffer of_a, of_b, of_h;
    static const float none[kColumns] = {};  // the first step's a stands before nothing, whatever it is
    for (int64_t t = 0; t < r.steps; t++, at += r.inner) {
      const float* factor = t ? widened(a + at, n, of_a) : none;
      advance(carry, factor, widened(b + at, n, of_b), written(h + at, of_h), n);
      finish(h + at, n, of_h);
    }
  });
}

template <class T>
void backward(const LinearRecurrenceBackwardArgs& r, const Parallel& par) {
  const T *a = static_cast<const T*>(r.a), *h = static_cast<const T*>(r.h), *grad = static_cast<const T*>(r.grad);
  T *da = static_cast<T*>(r.da), *db = static_cast<T*>(r.db);
  over_columns(par, r.outer, r.steps, r.inner, [&](int64_t first, int64_t n) {
    double carry[kColumns] = {};
    Buffer of_a, of_g, of_h, of_da, of_db, unwanted;
    static const float none[kColumns] = {};
    for (int64_t t = r.steps; t-- > 0;) {
      const int64_t at = first + t * r.inner;
      const float* factor = t + 1 < r.steps ? widened(a + at + r.inner, n, of_a) : none;
      advance(carry, factor, widened(grad + at, n, of_g), db ? written(db + at, of_db) : unwanted.row, n);
      if (db) finish(db + at, n, of_db);
      if (!da) continue;
      const float* before = t ? widened(h + at - r.inner, n, of_h) : none;
      float* to = written(da + at, of_da);
      for (int64_t j = 0; j < n; j++) to[j] = t ? static_cast<float>(carry[j] * before[j]) : 0.f;
      finish(da + at, n, of_da);
    }
  });
}

}  // namespace

void linear_recurrence_forward(const LinearRecurrenceArgs& r, const Parallel& par) {
  r.bf16 ? forward<bf16>(r, par) : forward<float>(r, par);
}
void linear_recurrence_backward(const LinearRecurrenceBackwardArgs& r, const Parallel& par) {
  r.bf16 ? backward<bf16>(r, par) : backward<float>(r, par);
}

}  // namespace jaxext::JAXEXT_ISA
#endif  // JAXEXT_KERNEL

#ifdef JAXEXT_HANDLER
#include "ffi.h"

JAXEXT_DECLARE(linear_recurrence_forward, LinearRecurrenceArgs)
JAXEXT_DECLARE(linear_recurrence_backward, LinearRecurrenceBackwardArgs)

namespace jaxext {
namespace {

// Reads operands and results, all of the shape and type of the first, and keeps the first complaint.
struct Reader {
  const char* op;
  ffi::AnyBuffer first;
  ffi::Error error = ffi::Error::Success();

  template <class Buffer>
  void* read(const Buffer& buffer, const char* name) {
    const bool same = same_shape(buffer.dimensions(), first.dimensions()) && buffer.element_type() == first.element_type();
    if (!same && error.success())
      error = bad_argument(op, name, "of a's shape " + shape_text(first.dimensions()) + " and type");
    return buffer.untyped_data();
  }
};

// The complaint about a, where it is no array that the kernels take.
ffi::Error check_first(const char* op, ffi::RemainingArgs args, size_t count) {
  if (args.size() != count) return bad_argument(op, "a", "followed by its other operands");
  const auto a = args.get<ffi::AnyBuffer>(0);
  if (!a.has_value() || a->dimensions().size() < 2 || !is_float(a->element_type()))
    return bad_argument(op, "a", "f32 or bf16 of rank 2 or more");
  return ffi::Error::Success();
}

// Operands: a, b. Result: h.
ffi::Error forward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const char* op = "linear_recurrence";
  if (ffi::Error bad = check_first(op, args, 2); bad.failure()) return bad;
  if (rets.size() != 1) return bad_argument(op, "h", "the only result");
  Reader reader{op, *args.get<ffi::AnyBuffer>(0)};
  const auto dims = reader.first.dimensions();
  LinearRecurrenceArgs r{};
  r.a = reader.first.untyped_data();
  r.b = reader.read(*args.get<ffi::AnyBuffer>(1), "b");
  r.h = reader.read(**rets.get<ffi::AnyBuffer>(0), "h");
  r.outer = product(dims, 0, dims.size() - 2);
  r.steps = dims[dims.size() - 2];
  r.inner = dims[dims.size() - 1];
  r.bf16 = reader.first.element_type() == ffi::DataType::BF16;
  if (reader.error.failure()) return reader.error;
  JAXEXT_DISPATCH(linear_recurrence_forward)(r, parallel(pool));
  return ffi::Error::Success();
}

// Operands: a, b, h, grad. Results: [da], [db].
ffi::Error backward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, bool wants_a, bool wants_b) {
  const char* op = "linear_recurrence_backward";
  if (ffi::Error bad = check_first(op, args, 4); bad.failure()) return bad;
  if (rets.size() != static_cast<size_t>(wants_a) + wants_b)
    return bad_argument(op, "da", "and db as the flags name them");
  Reader reader{op, *args.get<ffi::AnyBuffer>(0)};
  const auto dims = reader.first.dimensions();
  LinearRecurrenceBackwardArgs r{};
  r.a = reader.first.untyped_data();
  reader.read(*args.get<ffi::AnyBuffer>(1), "b");
  r.h = reader.read(*args.get<ffi::AnyBuffer>(2), "h");
  r.grad = reader.read(*args.get<ffi::AnyBuffer>(3), "grad");
  if (wants_a) r.da = reader.read(**rets.get<ffi::AnyBuffer>(0), "da");
  if (wants_b) r.db = reader.read(**rets.get<ffi::AnyBuffer>(wants_a), "db");
  r.outer = product(dims, 0, dims.size() - 2);
  r.steps = dims[dims.size() - 2];
  r.inner = dims[dims.size() - 1];
  r.bf16 = reader.first.element_type() == ffi::DataType::BF16;
  if (reader.error.failure()) return reader.error;
  JAXEXT_DISPATCH(linear_recurrence_backward)(r, parallel(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxext

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_linear_recurrence, jaxext::forward,
                              xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_linear_recurrence_backward, jaxext::backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("wants_a")
                                  .Attr<bool>("wants_b"));
#endif  // JAXEXT_HANDLER
