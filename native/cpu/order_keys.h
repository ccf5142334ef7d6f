// Numbers as signed 32-bit integers of JAX's order: -0 equal to +0, NaNs last.
#pragma once
#include <climits>

#include "vec.h"

namespace jaxext::JAXEXT_ISA {

// Of f32: infinity's bits, and below the second a number counts as zero: XLA's threads read denormals as that.
constexpr int32_t kInfinityF32 = 0x7f800000, kNormalF32 = 0x00800000;

// T: the stored type, signed for floats. kInfinity: the bits of infinity, 0 for integers. kNormal: as above. kLargest: else
// the order is turned round, with NaNs last still.
template <class T, int32_t kInfinity, int32_t kNormal, bool kLargest>
JAXEXT_INLINE vi keys_of(const T* p) {
  typedef T stored __attribute__((vector_size(kLanes * sizeof(T))));
  stored raw;
  memcpy(&raw, p, sizeof raw);
  vi x = __builtin_convertvector(raw, vi);
  if constexpr (kInfinity != 0) {
    constexpr int32_t magnitude = (int32_t)((1u << (8 * sizeof(T) - 1)) - 1);
    vi size = x & magnitude;
    if constexpr (kNormal != 0) size = size < kNormal ? vi{} : size;
    const vi key = x < 0 ? -size : size;
    return size > kInfinity ? splat_i(INT_MAX) : kLargest ? key : -key;
  }
  if constexpr (sizeof(T) == 4 && (T)-1 > 0) x ^= INT_MIN;
  return kLargest ? x : ~x;
}

}  // namespace jaxext::JAXEXT_ISA
