// Matrix product with float32 accumulation, out = a b or out += a b, for operands stored either way round.
//
// A task makes one block of one result of the batch. It packs a block of b into panels that stay in the second-level
// cache and runs the register-blocked tile over it. Rows of f32 that are contiguous along k are read in place.
#include "product.h"

#ifdef JAXEXT_KERNEL
#include "few_columns.h"
#include "few_rows.h"
#include "panels.h"
#include "small_products.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kProductRows = 264, kProductColumns = 256;  // of a task's block; multiples of kRows and kPanel
static_assert(kProductRows % kRows == 0 && kProductColumns % kPanel == 0);

// Rows [i, i + m) and steps [p, p + k) of a, ready for the tile.
template <class Mode, class X>
Left left_block(const ProductArgs& a, int64_t which, int64_t i, int64_t m, int64_t p, int64_t k, float* room) {
  const X* from = static_cast<const X*>(a.a.data) + which * a.m * a.k;
  if (a.a.turned) {
    pack_steps<Mode>(from + p * a.m + i, a.m, k, m, kProductRows + kLanes - kProductRows % kLanes, room);
    return {room, 1, kProductRows + kLanes - kProductRows % kLanes};
  }
  from += i * a.k + p;
  if constexpr (!Mode::kPaired && sizeof(X) == sizeof(float)) return {from, a.k, 1};
  for (int64_t r = 0; r < m; r++) pack_row<Mode>(from + r * a.k, k, room + r * kDepth);
  return {room, kDepth, 1};
}

template <class Mode, class X>
void right_block(const ProductArgs& a, int64_t which, int64_t j, int64_t n, int64_t p, int64_t k, float* room) {
  const X* from = static_cast<const X*>(a.b.data) + which * a.k * a.n;
  if (a.b.turned) pack_turned<Mode>(from + j * a.k + p, a.k, k, n, room);
  else pack_steps<Mode>(from + p * a.n + j, a.n, k, n, kPanel, room);
}

// out[kHeight][width] += a b, through a whole tile where the panel is wider than the result.
template <class Mode, int kHeight>
void add_tile(float* out, int64_t out_row, Left a, const float* panel, int64_t steps, int64_t width) {
  for (int64_t r = 0; r < kHeight; r++)  // needed only once the product is made
    for (int64_t c = 0; c < width; c += 16) prefetch(out + r * out_row + c);
  if (width == kPanel)
    return multiply_tile<Mode, kHeight, kTileVectors, true>(out, out_row, a, {panel, kPanel}, steps);
  alignas(64) float whole[kHeight * kPanel];
  multiply_tile<Mode, kHeight, kTileVectors, false>(whole, kPanel, a, {panel, kPanel}, steps);
  for (int64_t r = 0; r < kHeight; r++)
    for (int64_t c = 0; c < width; c++) out[r * out_row + c] += whole[r * kPanel + c];
}

template <class Mode>
void multiply_block(float* out, int64_t out_row, Left a, const float* b, int64_t m, int64_t n, int64_t steps) {
  for (int64_t c = 0; c < n; c += kPanel) {
    const float* panel = b + c * steps;
    const int64_t width = least(kPanel, n - c);
    int64_t r = 0;
    auto from = [&](int64_t row) { return Left{a.data + row * a.row, a.row, a.step}; };
    float* to = out + c;
    for (; r + kRows <= m; r += kRows) add_tile<Mode, kRows>(to + r * out_row, out_row, from(r), panel, steps, width);
    for (; r + kFewRows <= m; r += kFewRows)
      add_tile<Mode, kFewRows>(to + r * out_row, out_row, from(r), panel, steps, width);
    for (; r < m; r++) add_tile<Mode, 1>(to + r * out_row, out_row, from(r), panel, steps, width);
  }
}

// A block of sums as rows of bf16, `stride` apart.
void round_rows(const float* from, int64_t m, int64_t n, bf16* to, int64_t stride) {
  for (int64_t r = 0; r < m; r++) {
    const float* row = from + r * kProductColumns;
    bf16* out = to + r * stride;
    over_row(n, [&](int64_t j, auto part, int) __attribute__((always_inline)) { part.put(out + j, part.get(row + j)); });
  }
}

template <class Mode, class A, class B>
void multiply(const ProductArgs& a, const Parallel& par) {
  const int64_t height = block_of(a.m, kProductRows, kRows), width = block_of(a.n, kProductColumns, kPanel);
  const int64_t down = (a.m + height - 1) / height, across = (a.n + width - 1) / width;
  const int64_t depth = Mode::kPaired ? 2 * kDepth : kDepth;
  parallel_for(par, a.batch * down * across, [&](int64_t task) {
    const int64_t which = task / (down * across), block = task % (down * across);
    const int64_t i = block % down * height, j = block / down * width;
    const int64_t m = least(height, a.m - i), n = least(width, a.n - j);
    constexpr int64_t kRoom = (kProductColumns + kProductRows + kLanes) * kDepth;
    float* right = static_cast<float*>(thread_arena((kRoom + kProductRows * kProductColumns) * sizeof(float)));
    float* left = right + kProductColumns * kDepth;
    const int64_t first = (which * a.m + i) * a.n + j;
    float* out = a.out_bf16 ? right + kRoom : static_cast<float*>(a.out) + first;
    const int64_t out_row = a.out_bf16 ? kProductColumns : a.n;
    if (!a.adds)
      for (int64_t r = 0; r < m; r++) memset(out + r * out_row, 0, n * sizeof(float));
    for (int64_t p = 0; p < a.k; p += depth) {
      const int64_t k = least(depth, a.k - p);
      right_block<Mode, B>(a, which, j, n, p, k, right);
      multiply_block<Mode>(out, out_row, left_block<Mode, A>(a, which, i, m, p, k, left), right, m, n, words<Mode>(k));
    }
    if (a.out_bf16) round_rows(out, m, n, static_cast<bf16*>(a.out) + first, a.n);
  });
}

template <class Mode>
void multiply_as(const ProductArgs& a, const Parallel& par) {
  if (a.a.bf16) a.b.bf16 ? multiply<Mode, bf16, bf16>(a, par) : multiply<Mode, bf16, float>(a, par);
  else a.b.bf16 ? multiply<Mode, float, bf16>(a, par) : multiply<Mode, float, float>(a, par);
}

}  // namespace

void matrix_product(const ProductArgs& a, const Parallel& par) {
#if defined(__AVX512F__)
  if (has_few_columns(a)) return few_columns(a, par);
  if (has_few_rows(a)) return few_rows(a, par);
#endif
  if (are_small(a)) return small_products(a, par);
#if defined(__AVX512BF16__)
  if (a.rounds) return multiply_as<Paired>(a, par);
#endif
  multiply_as<Float32>(a, par);
}

}  // namespace jaxext::JAXEXT_ISA
#endif  // JAXEXT_KERNEL

#ifdef JAXEXT_HANDLER
#include "ffi.h"

JAXEXT_DECLARE(matrix_product, ProductArgs)

namespace jaxext {
namespace {

// Operands: a, b, [what is added to, which the result overwrites].
ffi::Error multiply(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::RemainingArgs sums,
                    ffi::Result<ffi::AnyBuffer> out, bool a_turned, bool b_turned, bool rounds) {
  const char* op = "matrix_product";
  const auto left = a.dimensions(), right = b.dimensions(), made = out->dimensions();
  const size_t rank = left.size(), row = rank - 2;
  if (rank < 2 || rank > 3 || !is_float(a.element_type())) return bad_argument(op, "a", "f32 or bf16 of rank 2 or 3");
  const int64_t batch = rank == 3 ? left[0] : 1, m = left[row + a_turned], k = left[row + !a_turned];
  if (right.size() != rank || (rank == 3 && right[0] != batch) || !is_float(b.element_type()) ||
      right[row + b_turned] != k)
    return bad_argument(op, "b", "f32 or bf16 of a's rank and batch, with as many rows as a has columns");
  const int64_t n = right[row + !b_turned];
  const bool out_bf16 = out->element_type() == ffi::DataType::BF16;
  if (made.size() != rank || (rank == 3 && made[0] != batch) || made[row] != m || made[row + 1] != n ||
      !is_float(out->element_type()) || (out_bf16 && sums.size()))
    return bad_argument(op, "out", "f32, or bf16 where nothing is added to, of a's batch and rows and b's columns");
  ProductArgs args{{a.untyped_data(), a.element_type() == ffi::DataType::BF16, a_turned},
                   {b.untyped_data(), b.element_type() == ffi::DataType::BF16, b_turned},
                   out->untyped_data(), batch, m, n, k, out_bf16, sums.size() > 0, rounds};
  if (args.adds) {
    const auto sum = sums.get<ffi::AnyBuffer>(0);
    if (sums.size() != 1 || !sum.has_value() || sum->untyped_data() != out->untyped_data())
      return bad_argument(op, "sum", "one buffer, which the result overwrites");
  }
  if (batch && m && n) JAXEXT_DISPATCH(matrix_product)(args, parallel(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxext

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_matrix_product, jaxext::multiply,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<bool>("a_turned")
                                  .Attr<bool>("b_turned")
                                  .Attr<bool>("rounds"));
#endif  // JAXEXT_HANDLER
