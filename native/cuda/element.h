// Elements of a row, several at a time, as floats. The same code on the device and, for tests, on the host.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define JAXEXT_BOTH __host__ __device__ __forceinline__
#else
#define JAXEXT_BOTH inline
#endif

namespace jaxext::cuda {

struct bf16 {
  uint16_t bits;
};

JAXEXT_BOTH float as_float(float x) { return x; }
JAXEXT_BOTH float as_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

JAXEXT_BOTH void round_to(float x, float& to) { to = x; }
JAXEXT_BOTH void round_to(float x, bf16& to) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  // To the nearest, ties to even; a NaN stays one.
  to.bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// n elements next to each other, moved at once where they are aligned.
template <class T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Pack {
  T at[n];
};

template <int n>
struct Floats {
  float at[n];
};

template <int n, class T>
JAXEXT_BOTH Floats<n> load(const T* from) {
  const Pack<T, n> pack = *reinterpret_cast<const Pack<T, n>*>(from);
  Floats<n> x;
  for (int k = 0; k < n; k++) x.at[k] = as_float(pack.at[k]);
  return x;
}

template <int n, class T>
JAXEXT_BOTH void store(T* to, const Floats<n>& x) {
  Pack<T, n> pack;
  for (int k = 0; k < n; k++) round_to(x.at[k], pack.at[k]);
  *reinterpret_cast<Pack<T, n>*>(to) = pack;
}

}  // namespace jaxext::cuda
