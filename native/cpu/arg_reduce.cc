// argmax and argmin: the first of equal elements, the first NaN where there is one, -0 equal to +0.
// Every type becomes a signed 32-bit key of that order, so that there is one kernel for all of them.
#include "cpu/arg_reduce.h"

#ifdef JAXEXT_KERNEL
#include "cpu/order_keys.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kBlock = 2048;           // elements of a row between two looks at the best so far
constexpr int kColumns = 4;                // registers of neighbouring columns
constexpr int64_t kTaskElements = 1 << 15;  // of a task, at least

// As keys_of, of one number.
template <class T, int32_t kInfinity, int32_t kNormal, bool kLargest>
JAXEXT_INLINE int32_t key_of(T raw) {
  int32_t x = (int32_t)raw;
  if constexpr (kInfinity != 0) {
    constexpr int32_t magnitude = (int32_t)((1u << (8 * sizeof(T) - 1)) - 1);
    const int32_t bits = x & magnitude, size = bits < kNormal ? 0 : bits, key = x < 0 ? -size : size;
    return size > kInfinity ? INT_MAX : kLargest ? key : -key;
  }
  if constexpr (sizeof(T) == 4 && (T)-1 > 0) x ^= INT_MIN;
  return kLargest ? x : ~x;
}

JAXEXT_INLINE int32_t largest_lane(vi x) {
  int32_t best = x[0];
  for (int i = 1; i < kLanes; i++) best = x[i] > best ? x[i] : best;
  return best;
}

// The largest key of x[0, n).
template <class T, int32_t kInfinity, int32_t kNormal, bool kLargest>
int32_t largest_key(const T* x, int64_t n) {
  vi best[4];
  for (auto& b : best) b = splat_i(INT_MIN);
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    JAXEXT_UNROLL for (int v = 0; v < 4; v++) {
      const vi key = keys_of<T, kInfinity, kNormal, kLargest>(x + i + v * kLanes);
      best[v] = key > best[v] ? key : best[v];
    }
  for (int v = 1; v < 4; v++) best[0] = best[v] > best[0] ? best[v] : best[0];
  int32_t all = largest_lane(best[0]);
  for (; i < n; i++) {
    const int32_t key = key_of<T, kInfinity, kNormal, kLargest>(x[i]);
    all = key > all ? key : all;
  }
  return all;
}

template <class T, int32_t kInfinity, int32_t kNormal, bool kLargest>
int32_t row(const T* x, int64_t n) {
  int64_t found = 0;  // start of the block with the best key
  int32_t best = INT_MIN;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int32_t key = largest_key<T, kInfinity, kNormal, kLargest>(x + i, n - i < kBlock ? n - i : kBlock);
    if (i == 0 || key > best) best = key, found = i;
    if (best == INT_MAX) break;
  }
  while (key_of<T, kInfinity, kNormal, kLargest>(x[found]) != best) found++;
  return (int32_t)found;
}

// kVectors registers of neighbouring columns of [n, inner].
template <class T, int32_t kInfinity, int32_t kNormal, bool kLargest, int kVectors>
JAXEXT_INLINE void columns(const T* x, int64_t n, int64_t inner, int32_t* indices) {
  vi best[kVectors], at[kVectors];
  JAXEXT_UNROLL for (int v = 0; v < kVectors; v++) {
    best[v] = keys_of<T, kInfinity, kNormal, kLargest>(x + v * kLanes);
    at[v] = vi{};
  }
  for (int64_t i = 1; i < n; i++)
    JAXEXT_UNROLL for (int v = 0; v < kVectors; v++) {
      const vi key = keys_of<T, kInfinity, kNormal, kLargest>(x + i * inner + v * kLanes), better = key > best[v];
      best[v] = better ? key : best[v];
      at[v] = better ? splat_i((int32_t)i) : at[v];
    }
  memcpy(indices, at, sizeof at);
}

template <class T, int32_t kInfinity, int32_t kNormal, bool kLargest>
void along_rows(const ArgReduceArgs& a, const Parallel& par) {
  const auto* x = static_cast<const T*>(a.x);
  parallel_rows(par, a.outer, a.n, kTaskElements, [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; r++)
      a.indices[r] = row<T, kInfinity, kNormal, kLargest>(x + r * a.n, a.n);
  });
}

template <class T, int32_t kInfinity, int32_t kNormal, bool kLargest>
void along_columns(const ArgReduceArgs& a, const Parallel& par) {
  constexpr int64_t kWide = kColumns * kLanes;
  const int64_t tiles = (a.inner + kWide - 1) / kWide;
  parallel_for(par, a.outer * tiles, [&](int64_t task) {
    const int64_t block = task / tiles, first = task % tiles * kWide;
    const int64_t last = first + kWide < a.inner ? first + kWide : a.inner;
    const auto* x = static_cast<const T*>(a.x) + block * a.n * a.inner;
    int32_t* indices = a.indices + block * a.inner;
    int64_t c = first;
    if (c + kWide <= last) return columns<T, kInfinity, kNormal, kLargest, kColumns>(x + c, a.n, a.inner, indices + c);
    for (; c + kLanes <= last; c += kLanes) columns<T, kInfinity, kNormal, kLargest, 1>(x + c, a.n, a.inner, indices + c);
    for (; c < last; c++) {
      int32_t best = key_of<T, kInfinity, kNormal, kLargest>(x[c]), at = 0;
      for (int64_t i = 1; i < a.n; i++) {
        const int32_t key = key_of<T, kInfinity, kNormal, kLargest>(x[i * a.inner + c]);
        if (key > best) best = key, at = (int32_t)i;
      }
      indices[c] = at;
    }
  });
}

template <class T, int32_t kInfinity, int32_t kNormal = 0>
void of_type(const ArgReduceArgs& a, const Parallel& par) {
  if (a.inner == 1)
    return a.largest ? along_rows<T, kInfinity, kNormal, true>(a, par)
                     : along_rows<T, kInfinity, kNormal, false>(a, par);
  a.largest ? along_columns<T, kInfinity, kNormal, true>(a, par) : along_columns<T, kInfinity, kNormal, false>(a, par);
}

}  // namespace

void arg_reduce(const ArgReduceArgs& a, const Parallel& par) {
  switch (a.type) {
    case Element::f32: return of_type<int32_t, kInfinityF32, kNormalF32>(a, par);
    case Element::bf16: return of_type<int16_t, 0x7f80, 0x0080>(a, par);
    case Element::f16: return of_type<int16_t, 0x7c00>(a, par);
    case Element::i8: return of_type<int8_t, 0>(a, par);
    case Element::i16: return of_type<int16_t, 0>(a, par);
    case Element::i32: return of_type<int32_t, 0>(a, par);
    case Element::u8: return of_type<uint8_t, 0>(a, par);
    case Element::u16: return of_type<uint16_t, 0>(a, par);
    case Element::u32: return of_type<uint32_t, 0>(a, par);
  }
}

}  // namespace jaxext::JAXEXT_ISA
#endif

#ifdef JAXEXT_HANDLER
#include "ffi.h"

JAXEXT_DECLARE(arg_reduce, ArgReduceArgs)

namespace jaxext {
namespace {

ffi::Error arg_reduce_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::Buffer<ffi::S32>> indices,
                              int64_t axis, bool largest) {
  const auto dims = x.dimensions(), out = indices->dimensions();
  axis += dims.size();
  ArgReduceArgs a{};
  if (!element_of(x.element_type(), a.type))
    return bad_argument("arg_reduce", "x", "an array of floats or integers of at most 32 bits");
  if (axis < 0 || axis >= (int64_t)dims.size() || dims[axis] < 1 || dims[axis] > INT32_MAX)
    return bad_argument("arg_reduce", "axis",
                        "counted from the end, one of x's, of 1 to 2^31 - 1 elements, x being " + shape_text(dims));
  bool fits = out.size() + 1 == dims.size();
  for (size_t d = 0; fits && d < out.size(); d++) fits = out[d] == dims[d + ((int64_t)d >= axis)];
  if (!fits) return bad_argument("arg_reduce", "indices", "of x's shape without the axis, x being " + shape_text(dims));
  a.x = x.untyped_data();
  a.indices = indices->typed_data();
  a.outer = product(dims, 0, axis);
  a.n = dims[axis];
  a.inner = product(dims, axis + 1, dims.size());
  a.largest = largest;
  if (a.outer > 0 && a.inner > 0) JAXEXT_DISPATCH(arg_reduce)(a, parallel(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxext

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_arg_reduce, jaxext::arg_reduce_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Attr<int64_t>("axis")
                                  .Attr<bool>("largest"));
#endif  // JAXEXT_HANDLER
