// lax.top_k: by a threshold that rises while a row is read. Elements above it are collected, and each time the
// collection is full it is sorted and cut to k, so almost every block of a row costs one comparison an element.
// The order is JAX's, a total one: +NaN first, -NaN last, +0 before -0; of equal elements the earlier.
#include "cpu/top_k.h"

#ifdef JAXEXT_KERNEL
namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kBlock = 64;             // elements compared at once
constexpr int64_t kInserted = 16;          // up to this k, each element is put in its place at once
constexpr int64_t kTaskElements = 1 << 15;  // of a task, at least

template <class T, KeyKind kKind>
JAXEXT_INLINE int32_t key_of(T bits) {
  const int32_t x = bits;  // sign-extended
  if (kKind == KeyKind::floating) return x ^ ((x >> 31) & (int32_t)((1u << (8 * sizeof(T) - 1)) - 1));
  if (kKind == KeyKind::unsigned_integer) return (T)((uint32_t)x ^ (1u << (8 * sizeof(T) - 1)));
  return x;
}

// A larger element is larger; of two equal ones, the earlier.
JAXEXT_INLINE uint64_t ranked(int32_t key, int64_t index) {
  return ((uint64_t)((uint32_t)key ^ 0x80000000u) << 32) | (uint32_t)~(uint32_t)index;
}

JAXEXT_INLINE void sift_down(uint64_t* heap, int64_t at, int64_t n) {
  const uint64_t moving = heap[at];
  for (int64_t child; (child = 2 * at + 1) < n; at = child) {
    if (child + 1 < n && heap[child + 1] < heap[child]) child++;
    if (heap[child] >= moving) break;
    heap[at] = heap[child];
  }
  heap[at] = moving;
}

// Largest first; insertion for few, a heap for many, whose worst case is as its average.
void sort_descending(uint64_t* x, int64_t n) {
  if (n <= 24) {
    for (int64_t i = 1; i < n; i++) {
      const uint64_t moving = x[i];
      int64_t j = i;
      for (; j > 0 && x[j - 1] < moving; j--) x[j] = x[j - 1];
      x[j] = moving;
    }
    return;
  }
  for (int64_t i = n / 2; i-- > 0;) sift_down(x, i, n);
  for (int64_t last = n - 1; last > 0; last--) {
    const uint64_t least = x[0];
    x[0] = x[last];
    x[last] = least;
    sift_down(x, 0, last);
  }
}

template <class T, KeyKind kKind>
JAXEXT_INLINE bool any_above(const T* x, int32_t threshold) {
  int32_t any = 0;
  for (int64_t i = 0; i < kBlock; i++) any |= -(int32_t)(key_of<T, kKind>(x[i]) > threshold);
  return any != 0;
}

// `kept` has room for 2 k + kBlock.
template <class T, KeyKind kKind>
void row(const T* x, int64_t n, int64_t k, uint64_t* kept, T* values, int32_t* indices) {
  const int64_t room = 2 * k + kBlock;
  int64_t count = k;
  for (int64_t i = 0; i < k; i++) kept[i] = ranked(key_of<T, kKind>(x[i]), i);
  sort_descending(kept, k);
  auto threshold = [&] { return (int32_t)((uint32_t)(kept[k - 1] >> 32) ^ 0x80000000u); };
  int32_t least = threshold();
  auto insert = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int32_t key = key_of<T, kKind>(x[i]);
      if (key <= least) continue;
      const uint64_t moving = ranked(key, i);
      int64_t j = k - 1;
      for (; j > 0 && kept[j - 1] < moving; j--) kept[j] = kept[j - 1];
      kept[j] = moving;
      least = threshold();
    }
  };
  auto consider = [&](int64_t first, int64_t last) {
    if (k <= kInserted) return insert(first, last);
    if (count + (last - first) > room) {
      sort_descending(kept, count);
      count = k;
      least = threshold();
    }
    for (int64_t i = first; i < last; i++) {
      const int32_t key = key_of<T, kKind>(x[i]);
      kept[count] = ranked(key, i);
      count += key > least;
    }
  };
  int64_t i = k;
  for (; i + kBlock <= n; i += kBlock)
    if (any_above<T, kKind>(x + i, least)) consider(i, i + kBlock);
  consider(i, n);
  if (count > k) sort_descending(kept, count);
  for (int64_t j = 0; j < k; j++) {
    indices[j] = (int32_t)~(uint32_t)kept[j];
    values[j] = x[indices[j]];
  }
}

template <class T, KeyKind kKind>
void rows(const TopKArgs& a, const Parallel& par) {
  parallel_rows(par, a.rows, a.n, kTaskElements, [&](int64_t first, int64_t end) {
    // One more: an element that is not kept is written, too.
    auto* kept = static_cast<uint64_t*>(thread_arena((2 * a.k + kBlock + 1) * sizeof(uint64_t)));
    for (int64_t r = first; r < end; r++)
      row<T, kKind>(static_cast<const T*>(a.x) + r * a.n, a.n, a.k, kept, static_cast<T*>(a.values) + r * a.k,
                    a.indices + r * a.k);
  });
}

template <class T>
void of_kind(const TopKArgs& a, const Parallel& par) {
  if (a.kind == KeyKind::floating) return rows<T, KeyKind::floating>(a, par);
  if (a.kind == KeyKind::unsigned_integer) return rows<T, KeyKind::unsigned_integer>(a, par);
  rows<T, KeyKind::signed_integer>(a, par);
}

}  // namespace

void top_k(const TopKArgs& a, const Parallel& par) {
  if (a.bytes == 1) return of_kind<int8_t>(a, par);
  if (a.bytes == 2) return of_kind<int16_t>(a, par);
  of_kind<int32_t>(a, par);
}

}  // namespace jaxext::JAXEXT_ISA
#endif

#ifdef JAXEXT_HANDLER
#include "ffi.h"

JAXEXT_DECLARE(top_k, TopKArgs)

namespace jaxext {
namespace {

ffi::Error top_k_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> values,
                         ffi::Result<ffi::Buffer<ffi::S32>> indices) {
  const auto dims = x.dimensions();
  TopKArgs a{};
  Element type{};
  if (dims.size() < 1 || !element_of(x.element_type(), type))
    return bad_argument("top_k", "x", "an array of rank 1 or more of floats or integers of at most 32 bits");
  auto fits = [&](ffi::Span<const int64_t> out) {
    bool same = out.size() == dims.size() && out[out.size() - 1] <= dims[dims.size() - 1];
    for (size_t d = 0; same && d + 1 < dims.size(); d++) same = out[d] == dims[d];
    return same;
  };
  const auto out = values->dimensions();
  if (values->element_type() != x.element_type() || !fits(out) || !fits(indices->dimensions()) ||
      out[out.size() - 1] != indices->dimensions()[out.size() - 1])
    return bad_argument("top_k", "values", "of x's type and, but for the last dimension, shape; indices likewise, s32");
  a.kind = type <= Element::f16   ? KeyKind::floating
           : type <= Element::i32 ? KeyKind::signed_integer
                                  : KeyKind::unsigned_integer;
  a.x = x.untyped_data();
  a.values = values->untyped_data();
  a.indices = indices->typed_data();
  a.rows = product(dims, 0, dims.size() - 1);
  a.n = dims[dims.size() - 1];
  a.k = out[out.size() - 1];
  a.bytes = static_cast<int>(ffi::ByteWidth(x.element_type()));
  if (a.n > INT32_MAX) return bad_argument("top_k", "x", "of a last dimension below 2^31");
  if (a.rows > 0 && a.k > 0) JAXEXT_DISPATCH(top_k)(a, parallel(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxext

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_top_k, jaxext::top_k_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>());
#endif  // JAXEXT_HANDLER
