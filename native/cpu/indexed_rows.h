// Rows of an array by the numbers of its leading dimensions, as gather reads and scatter writes them.
#pragma once
#include "element.h"
#include "isa.h"

namespace jaxext {

constexpr int kMostIndexed = 4;

// Which rows of an array of [sizes[0], …, sizes[depth - 1], row] a list of index vectors means.
struct RowNumbers {
  const int32_t* indices;  // [count, depth]
  int64_t count, depth;
  int64_t sizes[kMostIndexed];
  bool clips;  // an index outside means the nearest one inside, else no row
};

struct GatherArgs {
  RowNumbers numbers;
  const void* table;  // [rows, row_bytes]
  void* out;          // [count, row_bytes]
  int64_t row_bytes;
  uint64_t fill;    // the bits of what stands where an index means no row
  int fill_bytes;  // 1, 2 or 4
};

enum class ScatterKind : int { add, max, min, set };

struct ScatterArgs {
  RowNumbers numbers;
  void* table;          // [rows, width], changed in place
  const void* updates;  // [count, width]
  int64_t rows, width;
  ScatterKind kind;
  Element type;  // f32, bf16 or i32
};

struct DistinctArgs {
  RowNumbers numbers;  // of one indexed dimension
  int32_t* rows;       // [most]: each row that is meant once, then sizes[0], which is none
  int32_t* places;     // [count]: into rows; `most` where an index means no row
  int64_t most;        // the fewer of count and sizes[0]
};

}  // namespace jaxext

#ifdef JAXEXT_KERNEL
namespace jaxext::JAXEXT_ISA {

// The row that index vector i means: below 0 or `beyond` where there is none. With one indexed dimension, in the order
// of the indices.
JAXEXT_INLINE int64_t row_number(const RowNumbers& numbers, int64_t i, int64_t beyond) {
  if (numbers.depth == 1) {
    const int64_t index = numbers.indices[i], last = numbers.sizes[0] - 1;
    const int64_t nearest = index < 0 ? 0 : index > last ? last : index;
    return numbers.clips || nearest == index ? nearest : index < 0 ? -1 : beyond;
  }
  int64_t row = 0;
  for (int64_t d = 0; d < numbers.depth; d++) {
    const int64_t index = numbers.indices[i * numbers.depth + d], last = numbers.sizes[d] - 1;
    const int64_t nearest = index < 0 ? 0 : index > last ? last : index;
    if (!numbers.clips && nearest != index) return beyond;
    row = row * numbers.sizes[d] + nearest;
  }
  return row;
}

}  // namespace jaxext::JAXEXT_ISA
#endif

#ifdef JAXEXT_HANDLER
#include "ffi.h"

namespace jaxext {

// Fills in which rows of `table` the indices [..., depth] mean; false where they do not fit it.
inline bool row_numbers(ffi::Span<const int64_t> table, const ffi::Buffer<ffi::S32>& indices, bool clips,
                        RowNumbers& numbers) {
  const auto dims = indices.dimensions();
  if (dims.size() < 1) return false;
  const int64_t depth = dims[dims.size() - 1];
  if (depth < 1 || depth > kMostIndexed || depth > (int64_t)table.size()) return false;
  numbers = {indices.typed_data(), product(dims, 0, dims.size() - 1), depth, {}, clips};
  for (int64_t d = 0; d < depth; d++) numbers.sizes[d] = table[d];
  return true;
}

// Whether `rows` is [*batch, *row] for indices [*batch, depth] and a table [*indexed, *row].
inline bool fits_rows(ffi::Span<const int64_t> rows, ffi::Span<const int64_t> table, ffi::Span<const int64_t> indices) {
  const size_t batch = indices.size() - 1, depth = indices[batch];
  bool fits = rows.size() == batch + table.size() - depth;
  for (size_t d = 0; fits && d < rows.size(); d++)
    fits = rows[d] == (d < batch ? indices[d] : table[depth + d - batch]);
  return fits;
}

}  // namespace jaxext
#endif
