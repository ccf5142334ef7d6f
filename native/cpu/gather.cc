// gather of whole rows: one copy a row, asked for ahead.
#include "cpu/indexed_rows.h"

#ifdef JAXEXT_KERNEL
#include "cpu/rows.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kTaskBytes = 1 << 17;  // written by a task, at least
constexpr int64_t kAhead = 8;            // rows between the one that is asked for and the one that is copied
constexpr int64_t kAskedBytes = 1024;    // of a row; the hardware asks for the rest
constexpr int64_t kRegister = sizeof(vf);

template <int64_t kBytes>
JAXEXT_INLINE void copy(char* to, const char* from) {
  char t[kBytes];
  memcpy(t, from, kBytes);
  memcpy(to, t, kBytes);
}

// Two copies that overlap, for rows of kBytes to 2 kBytes.
template <int64_t kBytes>
JAXEXT_INLINE void copy_ends(char* to, const char* from, int64_t bytes) {
  char first[kBytes], last[kBytes];
  memcpy(first, from, kBytes);
  memcpy(last, from + bytes - kBytes, kBytes);
  memcpy(to, first, kBytes);
  memcpy(to + bytes - kBytes, last, kBytes);
}

JAXEXT_INLINE void copy_short(char* to, const char* from, int64_t bytes) {
  if (bytes >= 32) return copy_ends<32>(to, from, bytes);
  if (bytes >= 16) return copy_ends<16>(to, from, bytes);
  if (bytes >= 8) return copy_ends<8>(to, from, bytes);
  if (bytes >= 4) return copy_ends<4>(to, from, bytes);
  if (bytes >= 2) return copy_ends<2>(to, from, bytes);
  *to = *from;
}

JAXEXT_INLINE void copy_row(char* to, const char* from, int64_t bytes, bool past) {
  if (bytes < kRegister) return copy_short(to, from, bytes);
  int64_t j = 0;
  if (past)  // whole registers: see past_caches
    for (; j < bytes; j += kRegister)
      store_past_caches(reinterpret_cast<float*>(to + j), load(reinterpret_cast<const float*>(from + j)));
  else
    for (; j + kRegister <= bytes; j += kRegister) copy<kRegister>(to + j, from + j);
  if (j < bytes) copy<kRegister>(to + bytes - kRegister, from + bytes - kRegister);
}

}  // namespace

void gather_rows(const GatherArgs& a, const Parallel& par) {
  const auto* table = static_cast<const char*>(a.table);
  const int64_t bytes = a.row_bytes, count = a.numbers.count;
  auto* out = static_cast<char*>(a.out);
  char* filler = nullptr;
  if (!a.numbers.clips) {
    filler = static_cast<char*>(thread_arena(bytes));
    for (int64_t j = 0; j < bytes; j += a.fill_bytes) memcpy(filler + j, &a.fill, a.fill_bytes);
  }
  int64_t rows = 1;
  for (int64_t d = 0; d < a.numbers.depth; d++) rows *= a.numbers.sizes[d];
  const bool past = bytes % 64 == 0 && past_caches(static_cast<const float*>(a.out), count, bytes / 4);
  parallel_rows(par, count, bytes, kTaskBytes, [&](int64_t first, int64_t end) {
    const RowNumbers numbers = a.numbers;  // a copy, which stores to `out` cannot change
    auto source = [&](int64_t i) -> const char* {
      const int64_t row = row_number(numbers, i, rows);
      return row < 0 || row >= rows ? filler : table + row * bytes;
    };
    const int64_t asked = bytes < kAskedBytes ? bytes : kAskedBytes;
    for (int64_t i = first; i < end; i++) {
      if (i + kAhead < end) {
        const char* next = source(i + kAhead);
        for (int64_t j = 0; j < asked; j += 64) prefetch(next + j);
      }
      copy_row(out + i * bytes, source(i), bytes, past);
    }
    finish_stores(past);
  });
}

}  // namespace jaxext::JAXEXT_ISA
#endif

#ifdef JAXEXT_HANDLER
JAXEXT_DECLARE(gather_rows, GatherArgs)

namespace jaxext {
namespace {

ffi::Error gather_rows_handler(ffi::ThreadPool pool, ffi::AnyBuffer table, ffi::Buffer<ffi::S32> indices,
                               ffi::Result<ffi::AnyBuffer> out, bool clips, int64_t fill) {
  const auto dims = table.dimensions();
  GatherArgs a{};
  Element type{};
  if (!element_of(table.element_type(), type))
    return bad_argument("gather_rows", "table", "an array of floats or integers of at most 32 bits");
  if (!row_numbers(dims, indices, clips, a.numbers))
    return bad_argument("gather_rows", "indices", "[..., 1 to 4], table being " + shape_text(dims));
  if (out->element_type() != table.element_type() || !fits_rows(out->dimensions(), dims, indices.dimensions()))
    return bad_argument("gather_rows", "out", "a row of table for each index, table being " + shape_text(dims));
  if (clips && product(dims, 0, a.numbers.depth) == 0 && a.numbers.count > 0)
    return bad_argument("gather_rows", "table", "an array with a row to read");
  a.table = table.untyped_data();
  a.out = out->untyped_data();
  a.fill_bytes = static_cast<int>(ffi::ByteWidth(table.element_type()));
  a.fill = static_cast<uint64_t>(fill);
  a.row_bytes = product(dims, a.numbers.depth, dims.size()) * a.fill_bytes;
  if (a.numbers.count > 0 && a.row_bytes > 0) JAXEXT_DISPATCH(gather_rows)(a, parallel(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxext

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_gather_rows, jaxext::gather_rows_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<bool>("clips")
                                  .Attr<int64_t>("fill"));
#endif  // JAXEXT_HANDLER
