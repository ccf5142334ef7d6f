// scatter, scatter-add, -max and -min of whole rows, each row's updates in the order of their indices, however many threads.
// Where the indices ascend the updates are divided among threads; otherwise one thread reads them as they come, which is
// as fast as several that each skip the others' rows. bfloat16 sums are kept in float32 until a row is complete, so its
// updates are put in order first.
#include "cpu/indexed_rows.h"

#ifdef JAXEXT_KERNEL
#include "cpu/rows.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kTaskElements = 1 << 15;  // of a task, at least
constexpr int64_t kAhead = 8;               // updates between the one that is asked for and the one that is read
constexpr int64_t kBlock = 1024;            // indices compared at once
constexpr int64_t kAskedBytes = 256;        // of a row; the hardware asks for the rest

struct Add {
  static JAXEXT_INLINE vf step(vf a, vf b) { return a + b; }
  static JAXEXT_INLINE int32_t step(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }
};
struct Max {
  static JAXEXT_INLINE vf step(vf a, vf b) { return larger(a, b); }
  static JAXEXT_INLINE int32_t step(int32_t a, int32_t b) { return a > b ? a : b; }
};
struct Min {
  static JAXEXT_INLINE vf step(vf a, vf b) { return smaller(a, b); }
  static JAXEXT_INLINE int32_t step(int32_t a, int32_t b) { return a < b ? a : b; }
};
struct Set {
  static JAXEXT_INLINE vf step(vf, vf b) { return b; }
  static JAXEXT_INLINE int32_t step(int32_t, int32_t b) { return b; }
};

// `row` takes in one update.
template <class Kind, class T>
JAXEXT_INLINE void take_in(float* row, const T* update, int64_t width) {
  over_row(width, [&](int64_t j, auto part, int) {
    part.put(row + j, Kind::step(part.get(row + j), part.get(update + j)));
  });
}
template <class Kind>
JAXEXT_INLINE void take_in(int32_t* row, const int32_t* update, int64_t width) {
  for (int64_t j = 0; j < width; j++) row[j] = Kind::step(row[j], update[j]);
}

template <class To, class From>
JAXEXT_INLINE void convert(To* to, const From* from, int64_t width) {
  over_row(width, [&](int64_t j, auto part, int) { part.put(to + j, part.get(from + j)); });
}

// The updates in the order in which they are taken in: a permutation, or as they come.
struct Order {
  RowNumbers numbers;
  const uint32_t* places;  // null: as they come
  int64_t count, rows;
  JAXEXT_INLINE int64_t place(int64_t i) const { return places ? places[i] : i; }
  JAXEXT_INLINE int64_t row(int64_t i) const { return row_number(numbers, place(i), rows); }
};

// Whether the indices ascend, and so the rows; of several indexed dimensions it is not asked.
JAXEXT_INLINE bool ascending(const RowNumbers& numbers) {
  if (numbers.depth != 1) return numbers.count <= 1;
  for (int64_t i = 1; i < numbers.count; i += kBlock) {
    const int64_t end = i + kBlock < numbers.count ? i + kBlock : numbers.count;
    int32_t falls = 0;
    for (int64_t j = i; j < end; j++) falls |= numbers.indices[j] < numbers.indices[j - 1];
    if (falls) return false;
  }
  return true;
}

// Places of the updates, by row and then as they come; those of no row are left out. `starts`: [rows + 1].
int64_t put_in_order(const Order& order, uint32_t* starts, uint32_t* places) {
  memset(starts, 0, (order.rows + 1) * sizeof *starts);
  auto kept = [&](int64_t row) { return row >= 0 && row < order.rows; };
  for (int64_t i = 0; i < order.count; i++)
    if (const int64_t row = order.row(i); kept(row)) starts[row]++;
  uint32_t before = 0;
  for (int64_t r = 0; r < order.rows; r++) {
    const uint32_t own = starts[r];
    starts[r] = before;
    before += own;
  }
  for (int64_t i = 0; i < order.count; i++)
    if (const int64_t row = order.row(i); kept(row)) places[starts[row]++] = (uint32_t)i;
  return before;
}

// Updates [first, last) of the order. `asks`: for lines ahead, which the hardware does not foresee. `sums`: room for one
// row, used where T is narrower than what is summed.
template <class Kind, class T, class Sum>
void some(const ScatterArgs& a, const Order order, bool asks, int64_t first, int64_t last, Sum* sums) {
  constexpr bool widens = sizeof(Sum) != sizeof(T);
  const int64_t asked = a.width * sizeof(T) < kAskedBytes ? a.width * sizeof(T) : kAskedBytes;
  auto* table = static_cast<T*>(a.table);
  const auto* updates = static_cast<const T*>(a.updates);
  int64_t open = -1;  // the row that `sums` stands for
  auto close = [&] {
    if constexpr (widens)
      if (open >= 0) convert(table + open * a.width, sums, a.width);
  };
  for (int64_t i = first; i < last; i++) {
    if (asks && i + kAhead < last) {
      const auto* update = reinterpret_cast<const char*>(updates + order.place(i + kAhead) * a.width);
      const auto* row = reinterpret_cast<const char*>(table + order.row(i + kAhead) * a.width);
      for (int64_t j = 0; j < asked; j += 64) {
        prefetch(row + j);
        if (order.places) prefetch(update + j);
      }
    }
    const int64_t row = order.row(i);
    if (row < 0 || row >= order.rows) continue;
    const T* update = updates + order.place(i) * a.width;
    if constexpr (widens) {
      if (row != open) {
        close();
        convert(sums, table + row * a.width, a.width);
        open = row;
      }
      take_in<Kind>(sums, update, a.width);
    } else {
      take_in<Kind>(table + row * a.width, update, a.width);
    }
  }
  close();
}

template <class Kind, class T, class Sum>
void of_type(const ScatterArgs& a, const Parallel& par) {
  constexpr bool widens = sizeof(Sum) != sizeof(T);
  Order order{a.numbers, nullptr, a.numbers.count, a.rows};
  const bool ascends = ascending(a.numbers), sorts = widens && !ascends;
  int64_t tasks = order.count * a.width / kTaskElements;
  tasks = tasks < 1 ? 1 : tasks > 4 * par.threads ? 4 * par.threads : tasks;
  const int64_t sums_bytes = widens ? (a.width * sizeof(Sum) + 63) / 64 * 64 : 0;
  const int64_t starts = sorts ? (a.rows + 1 + 15) / 16 * 16 : 0;
  auto* arena = static_cast<char*>(
      thread_arena(tasks * sums_bytes + (starts + (sorts ? order.count : 0)) * sizeof(uint32_t) + 64));
  if (sorts) {
    auto* counts = reinterpret_cast<uint32_t*>(arena + tasks * sums_bytes);
    order.count = put_in_order(order, counts, counts + starts);
    order.places = counts + starts;
  }
  if (!ascends && !sorts) tasks = 1;
  // A row is one task's: a task begins where another row does.
  auto begin = [&](int64_t task) {
    int64_t i = task * order.count / tasks;
    while (i > 0 && i < order.count && order.row(i) == order.row(i - 1)) i++;
    return i;
  };
  parallel_for(par, tasks, [&](int64_t task) {
    auto* sums = reinterpret_cast<Sum*>(arena + task * sums_bytes);
    some<Kind, T>(a, order, !ascends, begin(task), begin(task + 1), sums);
  });
}

template <class Kind>
void of_kind(const ScatterArgs& a, const Parallel& par) {
  if (a.type == Element::f32) return of_type<Kind, float, float>(a, par);
  if (a.type == Element::bf16) return of_type<Kind, bf16, float>(a, par);
  of_type<Kind, int32_t, int32_t>(a, par);
}

}  // namespace

void scatter_rows(const ScatterArgs& a, const Parallel& par) {
  if (a.kind == ScatterKind::add) return of_kind<Add>(a, par);
  if (a.kind == ScatterKind::max) return of_kind<Max>(a, par);
  if (a.kind == ScatterKind::set) return of_kind<Set>(a, par);
  of_kind<Min>(a, par);
}

}  // namespace jaxext::JAXEXT_ISA
#endif

#ifdef JAXEXT_HANDLER
JAXEXT_DECLARE(scatter_rows, ScatterArgs)

namespace jaxext {
namespace {

ffi::Error scatter_rows_handler(ffi::ThreadPool pool, ffi::AnyBuffer table, ffi::Buffer<ffi::S32> indices,
                                ffi::AnyBuffer updates, ffi::Result<ffi::AnyBuffer> out, bool clips, int64_t kind) {
  const auto dims = table.dimensions();
  const auto type = table.element_type();
  ScatterArgs a{};
  if (!element_of(type, a.type) || (!is_float(type) && a.type != Element::i32))
    return bad_argument("scatter_rows", "table", "an array of float32, bfloat16 or int32");
  if (!row_numbers(dims, indices, clips, a.numbers) || a.numbers.count > INT32_MAX)
    return bad_argument("scatter_rows", "indices", "[..., 1 to 4], table being " + shape_text(dims));
  if (updates.element_type() != type || !fits_rows(updates.dimensions(), dims, indices.dimensions()))
    return bad_argument("scatter_rows", "updates", "a row of table for each index, table being " + shape_text(dims));
  if (out->untyped_data() != table.untyped_data())
    return bad_argument("scatter_rows", "table", "the buffer that the result overwrites");
  if (kind < 0 || kind > 3) return bad_argument("scatter_rows", "kind", "0 (add), 1 (max), 2 (min) or 3 (set)");
  a.table = table.untyped_data();
  a.updates = updates.untyped_data();
  a.rows = product(dims, 0, a.numbers.depth);
  a.width = product(dims, a.numbers.depth, dims.size());
  a.kind = static_cast<ScatterKind>(kind);
  if (a.numbers.count > 0 && a.rows > 0 && a.width > 0) JAXEXT_DISPATCH(scatter_rows)(a, parallel(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxext

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_scatter_rows, jaxext::scatter_rows_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<bool>("clips")
                                  .Attr<int64_t>("kind"));
#endif  // JAXEXT_HANDLER
