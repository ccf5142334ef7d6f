// The rows that a list of indices means, each once in the order in which they first come, and where each index's row is
// among them. One thread: an index costs one look into a table of all rows, which the second-level cache nearly holds.
#include "cpu/indexed_rows.h"

#ifdef JAXEXT_KERNEL
#include "cpu/rows.h"

namespace jaxext::JAXEXT_ISA {

void distinct_rows(const DistinctArgs& a, const Parallel&) {
  const RowNumbers numbers = a.numbers;
  const int64_t beyond = numbers.sizes[0];
  auto* found = static_cast<int32_t*>(thread_arena(beyond * sizeof(int32_t)));  // a row's place, and one more; 0: none
  memset(found, 0, beyond * sizeof *found);
  int32_t count = 0;
  for (int64_t i = 0; i < numbers.count; i++) {
    const int64_t row = row_number(numbers, i, beyond);
    if (row < 0 || row >= beyond) {
      a.places[i] = (int32_t)a.most;
      continue;
    }
    if (found[row] == 0) {
      a.rows[count++] = (int32_t)row;
      found[row] = count;
    }
    a.places[i] = found[row] - 1;
  }
  for (int64_t i = count; i < a.most; i++) a.rows[i] = (int32_t)beyond;
}

}  // namespace jaxext::JAXEXT_ISA
#endif

#ifdef JAXEXT_HANDLER
JAXEXT_DECLARE(distinct_rows, DistinctArgs)

namespace jaxext {
namespace {

ffi::Error distinct_rows_handler(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> indices,
                                 ffi::Result<ffi::Buffer<ffi::S32>> rows, ffi::Result<ffi::Buffer<ffi::S32>> places,
                                 int64_t held, bool clips) {
  DistinctArgs a{};
  if (held < 1 || held > INT32_MAX) return bad_argument("distinct_rows", "held", "the rows of a table, 1 or more");
  const int64_t table[] = {held};
  if (indices.dimensions().size() != 2 || !row_numbers({table, 1}, indices, clips, a.numbers) ||
      a.numbers.count > INT32_MAX)
    return bad_argument("distinct_rows", "indices", "[n, 1]");
  a.most = a.numbers.count < held ? a.numbers.count : held;
  if (rows->dimensions().size() != 1 || rows->dimensions()[0] != a.most)
    return bad_argument("distinct_rows", "rows", "[the fewer of indices and rows]");
  if (places->dimensions().size() != 1 || places->dimensions()[0] != a.numbers.count)
    return bad_argument("distinct_rows", "places", "[n], n indices");
  a.rows = rows->typed_data();
  a.places = places->typed_data();
  if (a.numbers.count > 0) JAXEXT_DISPATCH(distinct_rows)(a, parallel(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxext

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_distinct_rows, jaxext::distinct_rows_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Attr<int64_t>("held")
                                  .Attr<bool>("clips"));
#endif  // JAXEXT_HANDLER
