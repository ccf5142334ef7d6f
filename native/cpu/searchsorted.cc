// searchsorted, registers of queries at a time. Where the array is sorted, neighbouring queries search only the part of it that
// holds all their places; else [0, n) is halved just as JAX's loop does, so that the places are JAX's too. Numbers are compared
// as integers whose order is JAX's: -0 equal to +0, NaNs last.
#include "cpu/searchsorted.h"

#ifdef JAXEXT_KERNEL
#include "cpu/order_keys.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kTaskQueries = 1 << 12;
constexpr int64_t kTaskKeys = 1 << 15;
constexpr int kRegisters = 4;  // of queries, whose loads need not wait for one another
constexpr int64_t kTogether = kRegisters * kLanes;
constexpr int64_t kBlock = 256;  // queries that are first given the part of the array that holds all their places

// The keys of kLanes numbers at p, to `to`.
template <bool kFloat>
JAXEXT_INLINE void put_keys(const int32_t* p, int32_t* to) {
  const vi key = keys_of<int32_t, kFloat ? kInfinityF32 : 0, kFloat ? kNormalF32 : 0, true>(p);
  memcpy(to, &key, sizeof key);
}

JAXEXT_INLINE vi gather(const int32_t* p, vi at) {
#if defined(__AVX512F__)
  return (vi)_mm512_mask_i32gather_epi32(__m512i{}, 0xffff, (__m512i)at, p, 4);
#elif defined(__AVX2__)
  return (vi)_mm256_i32gather_epi32(p, (__m256i)at, 4);
#else
  vi x;
  for (int i = 0; i < kLanes; i++) x[i] = p[at[i]];
  return x;
#endif
}

// Places lie from `low` to `high`.
struct Range {
  int32_t low, high;
};

int halvings_of(int64_t n) {
  int halvings = 0;
  while ((int64_t{1} << halvings) < n + 1) halvings++;
  return halvings;
}

template <bool kRight>
JAXEXT_INLINE void search(const int32_t* keys, Range range, int halvings, const int32_t* wanted, int32_t* place) {
  vi want[kRegisters], low[kRegisters], high[kRegisters];
  for (int r = 0; r < kRegisters; r++) {
    memcpy(&want[r], wanted + r * kLanes, sizeof want[r]);
    low[r] = splat_i(range.low);
    high[r] = splat_i(range.high);
  }
  for (int h = 0; h < halvings; h++)
    JAXEXT_UNROLL for (int r = 0; r < kRegisters; r++) {
      const vi middle = low[r] + ((high[r] - low[r]) >> 1), key = gather(keys, middle);
      const vi below = kRight ? want[r] < key : want[r] <= key;
      low[r] = below ? low[r] : middle;
      high[r] = below ? middle : high[r];
    }
  for (int r = 0; r < kRegisters; r++) memcpy(place + r * kLanes, &high[r], sizeof high[r]);
}

template <bool kRight>
int32_t search_one(const int32_t* keys, int64_t n, int32_t wanted) {
  int64_t low = 0, length = n;
  while (length > 0) {
    const int64_t half = length / 2, key = keys[low + half];
    const bool below = kRight ? wanted < key : wanted <= key;
    low = below ? low : low + half + 1;
    length = below ? half : length - half - 1;
  }
  return (int32_t)low;
}

// One block of queries; where the keys are sorted its own range of them is searched, which is short if queries are near.
template <bool kFloat, bool kRight>
void search_block(const SearchSortedArgs& a, const int32_t* keys, bool sorted, int64_t first, int64_t count) {
  int32_t wanted[kBlock] = {}, place[kBlock];
  memcpy(wanted, a.query + first, count * sizeof(int32_t));
  const int64_t padded = (count + kTogether - 1) / kTogether * kTogether;
  for (int64_t i = 0; i < padded; i += kLanes) put_keys<kFloat>(wanted + i, wanted + i);
  Range range{0, (int32_t)a.n};
  if (sorted) {
    int32_t least = wanted[0], most = wanted[0];
    for (int64_t i = 1; i < count; i++) {
      least = wanted[i] < least ? wanted[i] : least;
      most = wanted[i] > most ? wanted[i] : most;
    }
    // One below the first place: JAX's loop ends with low = high - 1, and low is never looked at again.
    const int32_t before = search_one<kRight>(keys, a.n, least);
    range = {before > 0 ? before - 1 : 0, search_one<kRight>(keys, a.n, most)};
  }
  const int halvings = halvings_of(range.high - range.low);
  for (int64_t i = 0; i < padded; i += kTogether) search<kRight>(keys, range, halvings, wanted + i, place + i);
  memcpy(a.place + first, place, count * sizeof(int32_t));
}

template <bool kFloat, bool kRight>
void search_all(const SearchSortedArgs& a, const Parallel& par) {
  const int64_t parts = (a.n + kTaskKeys - 1) / kTaskKeys;
  auto* keys = static_cast<int32_t*>(thread_arena((a.n + kLanes + parts) * sizeof(int32_t)));
  int32_t* const unsorted = keys + a.n + kLanes;
  parallel_for(par, parts, [&](int64_t part) {
    const int64_t begin = part * kTaskKeys, end = begin + kTaskKeys < a.n ? begin + kTaskKeys : a.n;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) put_keys<kFloat>(a.sorted + i, keys + i);
    if (i < end) {
      int32_t rest[kLanes] = {};
      memcpy(rest, a.sorted + i, (end - i) * sizeof(int32_t));
      put_keys<kFloat>(rest, rest);
      memcpy(keys + i, rest, (end - i) * sizeof(int32_t));
    }
    int32_t falls = 0;
    for (int64_t k = begin + 1; k < end; k++) falls |= keys[k] < keys[k - 1];
    unsorted[part] = falls;
  });
  bool sorted = true;
  for (int64_t part = 0; part < parts; part++)
    sorted &= !unsorted[part] && (part == 0 || keys[part * kTaskKeys - 1] <= keys[part * kTaskKeys]);
  parallel_for(par, (a.count + kTaskQueries - 1) / kTaskQueries, [&](int64_t task) {
    const int64_t end = (task + 1) * kTaskQueries < a.count ? (task + 1) * kTaskQueries : a.count;
    for (int64_t i = task * kTaskQueries; i < end; i += kBlock)
      search_block<kFloat, kRight>(a, keys, sorted, i, end - i < kBlock ? end - i : kBlock);
  });
}

}  // namespace

void searchsorted(const SearchSortedArgs& a, const Parallel& par) {
  if (a.type == Element::f32) return a.right ? search_all<true, true>(a, par) : search_all<true, false>(a, par);
  a.right ? search_all<false, true>(a, par) : search_all<false, false>(a, par);
}

}  // namespace jaxext::JAXEXT_ISA
#endif

#ifdef JAXEXT_HANDLER
#include "ffi.h"

JAXEXT_DECLARE(searchsorted, SearchSortedArgs)

namespace jaxext {
namespace {

ffi::Error searchsorted_handler(ffi::ThreadPool pool, ffi::AnyBuffer sorted, ffi::AnyBuffer query,
                                ffi::Result<ffi::Buffer<ffi::S32>> place, bool right) {
  const auto dims = sorted.dimensions(), wanted = query.dimensions(), out = place->dimensions();
  SearchSortedArgs a{};
  const bool taken = element_of(sorted.element_type(), a.type) && (a.type == Element::f32 || a.type == Element::i32);
  if (!taken) return bad_argument("searchsorted", "sorted", "an array of float32 or int32");
  if (dims.size() != 1 || dims[0] < 1 || dims[0] >= INT32_MAX)
    return bad_argument("searchsorted", "sorted", "[n], n from 1 to 2^31 - 2, not " + shape_text(dims));
  if (query.element_type() != sorted.element_type()) return bad_argument("searchsorted", "query", "of sorted's type");
  if (!same_shape(out, wanted))
    return bad_argument("searchsorted", "place", "of query's shape, which is " + shape_text(wanted));
  a.sorted = static_cast<const int32_t*>(sorted.untyped_data());
  a.query = static_cast<const int32_t*>(query.untyped_data());
  a.place = place->typed_data();
  a.n = dims[0];
  a.count = product(wanted, 0, wanted.size());
  a.right = right;
  if (a.count > 0) JAXEXT_DISPATCH(searchsorted)(a, parallel(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxext

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_searchsorted, jaxext::searchsorted_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Attr<bool>("right"));
#endif  // JAXEXT_HANDLER
