// Walking a row register by register: the full registers, then the rest of the row as a partial one.
#pragma once
#include "vec.h"

namespace jaxext::JAXEXT_ISA {

// Stores that do not read the line they write: for results too large for any cache. p is aligned to a register.
JAXEXT_INLINE void store_past_caches(float* p, vf x) {
  touch(p, sizeof x);
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#else
  _mm_stream_ps(p, (__m128)x);
#endif
}
JAXEXT_INLINE void store_past_caches(bf16* p, vf x) {
  touch(p, sizeof x / 2);
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, (__m256i)narrow(x));
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)p, (__m128i)narrow(x));
#else
  store(p, x);
#endif
}

// Whether rows of n values at p should be stored past the caches: they exceed half of a large one, and are aligned.
template <class T>
JAXEXT_INLINE bool past_caches(const T* p, int64_t rows, int64_t n) {
  constexpr int64_t kBytes = int64_t{16} << 20;
  const int64_t row = n * static_cast<int64_t>(sizeof(T));
  return rows * row >= kBytes && row % 64 == 0 && reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

// Orders stores past the caches before whatever tells another thread that they are done.
JAXEXT_INLINE void finish_stores(bool past_caches) {
  if (past_caches) _mm_sfence();
}

struct Full {
  template <class T>
  JAXEXT_INLINE vf get(const T* p, float = 0.f) const { return load(p); }
  template <class T>
  JAXEXT_INLINE void put(T* p, vf x, bool past_caches = false) const {
    past_caches ? store_past_caches(p, x) : store(p, x);
  }
};

// The first n lanes only; the others read as `rest`.
struct First {
  int64_t n;
  template <class T>
  JAXEXT_INLINE vf get(const T* p, float rest = 0.f) const { return load_first(p, n, rest); }
  template <class T>
  JAXEXT_INLINE void put(T* p, vf x, bool = false) const { store_first(p, x, n); }
};

// body(j, part, k) for every register of a row of n; k in [0, 4) says which of four accumulators to use.
template <class Body>
JAXEXT_INLINE void over_row(int64_t n, Body&& body) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
    body(j, Full{}, 0);
    body(j + kLanes, Full{}, 1);
    body(j + 2 * kLanes, Full{}, 2);
    body(j + 3 * kLanes, Full{}, 3);
  }
  for (; j + kLanes <= n; j += kLanes) body(j, Full{}, 0);
  if (j < n) body(j, First{n - j}, 1);
}

// Four running sums, so that an addition need not wait for the one before.
struct Sums {
  vf part[4] = {};
  JAXEXT_INLINE float total() const { return reduce_add((part[0] + part[1]) + (part[2] + part[3])); }
};

// The hardware's own prefetch stops at a page, which a row often is.
JAXEXT_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

// Work below this many elements is done by the calling thread: waking another costs more.
constexpr int64_t kSerialElements = 32768;

JAXEXT_INLINE Parallel threads_for(const Parallel& par, int64_t elements) {
  Parallel p = par;
  if (elements < kSerialElements) p.threads = 1;
  return p;
}

}  // namespace jaxext::JAXEXT_ISA
