// Threefry 2x32 with 20 rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011), as
// JAX's partitionable generator uses it: element i is the exclusive or of both words of the block of counter i.
#include "cpu/random_bits.h"

#ifdef JAXEXT_KERNEL
#include "vec.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int kVectors = 4;                       // blocks in flight: a round's operations depend on each other
constexpr int64_t kStep = kVectors * kLanes;      // elements of one pass
constexpr int64_t kTaskElements = 1 << 14;        // of a task

template <int kBits>
JAXEXT_INLINE vu rotate(vu x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // A byte shuffle is one instruction on more ports than shifts have.
  if constexpr (kBits == 16 || kBits == 24) {
    typedef char bytes __attribute__((vector_size(32)));
    bytes places;
    for (int i = 0; i < 32; i++) places[i] = (char)((i & 12) | ((i - kBits / 8) & 3));
    return (vu)_mm256_shuffle_epi8((__m256i)x, (__m256i)places);
  }
#endif
  return (x << kBits) | (x >> (32 - kBits));
}

template <int kBits>
JAXEXT_INLINE void round(vu* a, vu* b) {
  JAXEXT_UNROLL for (int v = 0; v < kVectors; v++) {
    a[v] += b[v];
    b[v] = rotate<kBits>(b[v]) ^ a[v];
  }
}

JAXEXT_INLINE void inject(vu* a, vu* b, uint32_t to_a, uint32_t to_b) {
  JAXEXT_UNROLL for (int v = 0; v < kVectors; v++) {
    a[v] += to_a;
    b[v] += to_b;
  }
}

// out[v]: the elements at counters first + v * kLanes + lane.
JAXEXT_INLINE void blocks(const uint32_t* key, uint64_t first, vu* out) {
  const uint32_t k0 = key[0], k1 = key[1], k2 = k0 ^ k1 ^ 0x1BD11BDAu;
  const vu lane = (vu)lane_index();
  vu a[kVectors], b[kVectors];
  JAXEXT_UNROLL for (int v = 0; v < kVectors; v++) {
    const uint64_t at = first + (uint64_t)v * kLanes;
    // kLanes divides 2^32 and every `first`, so a vector's counters share their upper word.
    a[v] = vu{} + (uint32_t)(at >> 32) + k0;
    b[v] = lane + (uint32_t)at + k1;
  }
  auto even = [&] { round<13>(a, b), round<15>(a, b), round<26>(a, b), round<6>(a, b); };
  auto odd = [&] { round<17>(a, b), round<29>(a, b), round<16>(a, b), round<24>(a, b); };
  even(), inject(a, b, k1, k2 + 1);
  odd(), inject(a, b, k2, k0 + 2);
  even(), inject(a, b, k0, k1 + 3);
  odd(), inject(a, b, k1, k2 + 4);
  even(), inject(a, b, k2, k0 + 5);
  JAXEXT_UNROLL for (int v = 0; v < kVectors; v++) out[v] = a[v] ^ b[v];
}

template <class T>
void fill(const uint32_t* key, int64_t first, int64_t last, T* out) {
  typedef T narrow_t __attribute__((vector_size(kLanes * sizeof(T))));
  vu x[kVectors];
  int64_t i = first;
  for (; i + kStep <= last; i += kStep) {
    blocks(key, i, x);
    JAXEXT_UNROLL for (int v = 0; v < kVectors; v++) {
      const narrow_t y = __builtin_convertvector(x[v], narrow_t);
      memcpy(out + i + v * kLanes, &y, sizeof y);
    }
  }
  if (i == last) return;
  blocks(key, i, x);
  for (int64_t j = 0; i + j < last; j++) out[i + j] = (T)x[j / kLanes][j % kLanes];
}

template <class T>
void rows(const RandomBitsArgs& a, const Parallel& par) {
  // Many short rows share a task; a long one is cut where a vector begins.
  const int64_t parts = (a.n + kTaskElements - 1) / kTaskElements;
  parallel_rows(par, a.rows * parts, a.n, kTaskElements, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; piece++) {
      const int64_t row = piece / parts, first = piece % parts * kTaskElements;
      const int64_t last = first + kTaskElements < a.n ? first + kTaskElements : a.n;
      fill<T>(a.keys + 2 * row, first, last, static_cast<T*>(a.out) + row * a.n);
    }
  });
}

}  // namespace

void random_bits(const RandomBitsArgs& a, const Parallel& par) {
  if (a.bytes == 1) return rows<uint8_t>(a, par);
  if (a.bytes == 2) return rows<uint16_t>(a, par);
  rows<uint32_t>(a, par);
}

}  // namespace jaxext::JAXEXT_ISA
#endif

#ifdef JAXEXT_HANDLER
#include "ffi.h"

JAXEXT_DECLARE(random_bits, RandomBitsArgs)

namespace jaxext {
namespace {

ffi::Error random_bits_handler(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> keys, ffi::Result<ffi::AnyBuffer> out) {
  const auto dims = keys.dimensions(), shape = out->dimensions();
  if (dims.size() < 1 || dims[dims.size() - 1] != 2)
    return bad_argument("random_bits", "keys", "of uint32 with a last dimension of 2, got " + shape_text(dims));
  const size_t batch = dims.size() - 1;
  bool fits = shape.size() >= batch;
  for (size_t d = 0; fits && d < batch; d++) fits = shape[d] == dims[d];
  const ffi::DataType type = out->element_type();
  if (!fits || (type != ffi::DataType::U8 && type != ffi::DataType::U16 && type != ffi::DataType::U32))
    return bad_argument("random_bits", "out", "of uint8, uint16 or uint32 with the keys' leading dimensions");
  RandomBitsArgs a{keys.typed_data(), out->untyped_data(), product(dims, 0, batch),
                   product(shape, batch, shape.size()), static_cast<int>(ffi::ByteWidth(type))};
  if (a.rows > 0 && a.n > 0) JAXEXT_DISPATCH(random_bits)(a, parallel(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxext

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_random_bits, jaxext::random_bits_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()
                                  .Ret<xla::ffi::AnyBuffer>());
#endif  // JAXEXT_HANDLER
