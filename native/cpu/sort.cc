// A stable sort by least significant digit first (radix sort), in JAX's order: -0 equal to +0, all NaNs equal and last.
// Elements keep their bits; only the digit is taken from the key that has this order.
#include "cpu/sort.h"

#ifdef JAXEXT_KERNEL
#include <cstring>

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kInserted = 24;           // up to this length by insertion
constexpr int64_t kTaskElements = 1 << 13;  // of a task, at least
constexpr int64_t kShared = 1 << 15;        // a row this long may be sorted by several threads
constexpr int64_t kParts = 16;
// Wide digits mean fewer passes, and counters that cost more than a short row.
constexpr int kNarrow = 8, kWide = 11;

// kInfinity: the bits of infinity for floats, whose T is signed; 0 for integers. Below kNormal a float counts as zero:
// XLA's threads read denormals as that.
template <class T, int32_t kInfinity, int32_t kNormal = 0>
struct Keyed {
  typedef T Element;
  static constexpr int kBits = 8 * sizeof(T);
  // An unsigned number of T's width whose order is the elements'.
  static JAXEXT_INLINE uint32_t key(T raw) {
    constexpr uint32_t sign = 1u << (kBits - 1);
    const int32_t x = (int32_t)raw;
    if constexpr (kInfinity != 0) {
      const int32_t size = x & (int32_t)(sign - 1);
      if (size > kInfinity) return 2 * sign - 1;
      if (size < kNormal) return sign;
      return (uint32_t)(x < 0 ? -size : size) + sign;
    }
    constexpr bool is_signed = (T)-1 < 0;
    return ((uint32_t)x & (2 * sign - 1)) ^ (is_signed ? sign : 0u);
  }
};

// An element alone, or with its place.
template <class T>
struct Plain {
  T value;
};
template <class T>
struct Placed {
  T value;
  int32_t place;
};

template <class K, class E>
void insertion(E* x, int64_t n) {
  for (int64_t i = 1; i < n; i++) {
    const E moving = x[i];
    const uint32_t key = K::key(moving.value);
    int64_t j = i;
    for (; j > 0 && K::key(x[j - 1].value) > key; j--) x[j] = x[j - 1];
    x[j] = moving;
  }
}

// The kDigit bits of an element's key from `shift` on.
template <class K, int kDigit, class E>
JAXEXT_INLINE uint32_t digit(E e, int shift) {
  return (K::key(e.value) >> shift) & ((1u << kDigit) - 1);
}

template <class E>
JAXEXT_INLINE void swap(E*& a, E*& b) {
  E* const kept = a;
  a = b;
  b = kept;
}

// Sorts x[0, n) with `other` as room; returns whichever of the two has the result.
template <class K, class E, int kDigit>
E* radix(E* x, E* other, int64_t n) {
  constexpr int kPasses = (K::kBits + kDigit - 1) / kDigit, kSize = 1 << kDigit;
  uint32_t count[kPasses][kSize];
  memset(count, 0, sizeof count);
  for (int64_t i = 0; i < n; i++) {
    const uint32_t key = K::key(x[i].value);
    JAXEXT_UNROLL for (int p = 0; p < kPasses; p++) count[p][(key >> (p * kDigit)) & (kSize - 1)]++;
  }
  for (int p = 0; p < kPasses; p++) {
    const int shift = p * kDigit;
    // A digit that all elements share moves nothing: small integers, or floats of one sign and size.
    if (count[p][digit<K, kDigit>(x[0], shift)] == (uint32_t)n) continue;
    uint32_t before = 0;
    for (int d = 0; d < kSize; d++) {
      const uint32_t own = count[p][d];
      count[p][d] = before;
      before += own;
    }
    for (int64_t i = 0; i < n; i++) other[count[p][digit<K, kDigit>(x[i], shift)]++] = x[i];
    swap(x, other);
  }
  return x;
}

// The same by several threads: each counts and moves a part of its own, in the order of the parts, so that it stays stable.
// `counts` has room for 1 << kDigit of each part.
template <class K, class E, int kDigit>
E* shared_radix(E* x, E* other, int64_t n, uint32_t* counts, int64_t parts, const Parallel& par) {
  constexpr int kSize = 1 << kDigit;
  auto begin = [&](int64_t part) { return n * part / parts; };
  for (int shift = 0; shift < K::kBits; shift += kDigit) {
    parallel_for(par, parts, [&](int64_t part) {
      uint32_t* count = counts + part * kSize;
      memset(count, 0, kSize * sizeof *count);
      for (int64_t i = begin(part), end = begin(part + 1); i < end; i++) count[digit<K, kDigit>(x[i], shift)]++;
    });
    uint32_t before = 0, most = 0;
    for (int d = 0; d < kSize; d++) {
      const uint32_t first = before;
      for (int64_t part = 0; part < parts; part++) {
        const uint32_t own = counts[part * kSize + d];
        counts[part * kSize + d] = before;
        before += own;
      }
      most = before - first > most ? before - first : most;
    }
    if (most == (uint32_t)n) continue;
    parallel_for(par, parts, [&](int64_t part) {
      uint32_t* count = counts + part * kSize;
      for (int64_t i = begin(part), end = begin(part + 1); i < end; i++)
        other[count[digit<K, kDigit>(x[i], shift)]++] = x[i];
    });
    swap(x, other);
  }
  return x;
}

template <class K, class E>
E* sorted(E* x, E* other, int64_t n, uint32_t* counts, int64_t parts, const Parallel& par) {
  if (parts > 1) return shared_radix<K, E, (K::kBits > 16 ? kWide : kNarrow)>(x, other, n, counts, parts, par);
  if (n <= kInserted) return insertion<K>(x, n), x;
  if (K::kBits > 16 && n >= 4096) return radix<K, E, kWide>(x, other, n);
  return radix<K, E, kNarrow>(x, other, n);
}

template <class U, class E>
JAXEXT_INLINE void gather(const SortFollower& f, int64_t first, const E* x, int64_t n) {
  const U* from = static_cast<const U*>(f.x) + first;
  U* out = static_cast<U*>(f.out) + first;
  for (int64_t i = 0; i < n; i++) out[i] = from[x[i].place];
}

template <class E>
void follow(const SortFollower& f, int64_t first, const E* x, int64_t n) {
  switch (f.bytes) {
    case 1: return gather<uint8_t>(f, first, x, n);
    case 2: return gather<uint16_t>(f, first, x, n);
    case 4: return gather<uint32_t>(f, first, x, n);
    default: return gather<uint64_t>(f, first, x, n);
  }
}

template <class K>
void rows(const SortArgs& a, const Parallel& par) {
  typedef typename K::Element T;
  // Few long rows: one after the other, each by all threads.
  const int64_t parts = a.n < kShared || a.rows >= par.threads ? 1 : par.threads < kParts ? par.threads : kParts;
  Parallel over_rows = par;
  if (parts > 1) over_rows.threads = 1;
  parallel_rows(over_rows, a.rows, a.n, kTaskElements, [&](int64_t first, int64_t end) {
    const size_t element = a.n_followers ? sizeof(Placed<T>) : sizeof(Plain<T>);
    const size_t bytes = (a.n * element + 63) / 64 * 64;
    auto* room = static_cast<char*>(thread_arena(2 * bytes + (parts > 1 ? (parts << kWide) * sizeof(uint32_t) : 0)));
    auto* other = room + bytes;
    auto* counts = reinterpret_cast<uint32_t*>(other + bytes);
    for (int64_t r = first; r < end; r++) {
      const T* keys = static_cast<const T*>(a.keys) + r * a.n;
      T* out = static_cast<T*>(a.sorted) + r * a.n;
      if (a.n_followers == 0) {
        memcpy(room, keys, a.n * sizeof(T));
        memcpy(out, sorted<K>(reinterpret_cast<Plain<T>*>(room), reinterpret_cast<Plain<T>*>(other), a.n, counts, parts, par),
               a.n * sizeof(T));
        continue;
      }
      auto* x = reinterpret_cast<Placed<T>*>(room);
      for (int64_t i = 0; i < a.n; i++) x[i] = {keys[i], (int32_t)i};
      x = sorted<K>(x, reinterpret_cast<Placed<T>*>(other), a.n, counts, parts, par);
      for (int64_t i = 0; i < a.n; i++) out[i] = x[i].value;
      for (int f = 0; f < a.n_followers; f++) follow(a.followers[f], r * a.n, x, a.n);
    }
  });
}

}  // namespace

void sort(const SortArgs& a, const Parallel& par) {
  switch (a.type) {
    case Element::f32: return rows<Keyed<int32_t, 0x7f800000, 0x00800000>>(a, par);
    case Element::bf16: return rows<Keyed<int16_t, 0x7f80, 0x0080>>(a, par);
    case Element::f16: return rows<Keyed<int16_t, 0x7c00>>(a, par);
    case Element::i8: return rows<Keyed<int8_t, 0>>(a, par);
    case Element::i16: return rows<Keyed<int16_t, 0>>(a, par);
    case Element::i32: return rows<Keyed<int32_t, 0>>(a, par);
    case Element::u8: return rows<Keyed<uint8_t, 0>>(a, par);
    case Element::u16: return rows<Keyed<uint16_t, 0>>(a, par);
    case Element::u32: return rows<Keyed<uint32_t, 0>>(a, par);
  }
}

}  // namespace jaxext::JAXEXT_ISA
#endif

#ifdef JAXEXT_HANDLER
#include "ffi.h"

JAXEXT_DECLARE(sort, SortArgs)

namespace jaxext {
namespace {

ffi::Error sort_handler(ffi::ThreadPool pool, ffi::AnyBuffer keys, ffi::RemainingArgs others,
                        ffi::Result<ffi::AnyBuffer> sorted, ffi::RemainingRets outs) {
  const auto dims = keys.dimensions();
  SortArgs a{};
  if (dims.size() < 1 || !element_of(keys.element_type(), a.type))
    return bad_argument("sort", "keys", "an array of rank 1 or more of floats or integers of at most 32 bits");
  if (sorted->element_type() != keys.element_type() || !same_shape(sorted->dimensions(), dims))
    return bad_argument("sort", "sorted", "of the keys' type and shape, " + shape_text(dims));
  if (others.size() > kMostFollowers || outs.size() != others.size())
    return bad_argument("sort", "others", "at most 8 arrays, with as many results");
  a.keys = keys.untyped_data();
  a.sorted = sorted->untyped_data();
  a.n_followers = static_cast<int>(others.size());
  for (int f = 0; f < a.n_followers; f++) {
    auto x = others.get<ffi::AnyBuffer>(f);
    auto out = outs.get<ffi::AnyBuffer>(f);
    if (!x.has_value() || !out.has_value() || !same_shape(x->dimensions(), dims) ||
        !same_shape((*out)->dimensions(), dims) || x->element_type() != (*out)->element_type())
      return bad_argument("sort", "others", "of the keys' shape, " + shape_text(dims) + ", as their results");
    a.followers[f] = {x->untyped_data(), (*out)->untyped_data(), static_cast<int>(ffi::ByteWidth(x->element_type()))};
    const int bytes = a.followers[f].bytes;
    if (bytes != 1 && bytes != 2 && bytes != 4 && bytes != 8)
      return bad_argument("sort", "others", "of elements of 1, 2, 4 or 8 bytes");
  }
  a.rows = product(dims, 0, dims.size() - 1);
  a.n = dims[dims.size() - 1];
  if (a.n > INT32_MAX) return bad_argument("sort", "keys", "of a last dimension below 2^31");
  if (a.rows > 0 && a.n > 0) JAXEXT_DISPATCH(sort)(a, parallel(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxext

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_sort, jaxext::sort_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .RemainingRets());
#endif  // JAXEXT_HANDLER
