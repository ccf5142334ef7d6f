// The instruction set a translation unit is compiled for.
//
// Every native/cpu/<source>.cc is compiled once per instruction set with JAXEXT_KERNEL and JAXEXT_ISA=<v2|v3|v4|v4bf16>
// (kernels only: no library templates, whose instances the linker would share between instruction sets), and once at
// the baseline with JAXEXT_HANDLER (the FFI handlers, which choose among the kernels through JAXEXT_DISPATCH).
#pragma once
#include <cstddef>
#include <cstdint>

#define JAXEXT_INLINE inline __attribute__((always_inline))
#define JAXEXT_NOINLINE __attribute__((noinline))
#define JAXEXT_UNROLL _Pragma("GCC unroll 32")

namespace jaxext {

// How a kernel reaches the threads it was given: run(par, n, task, ctx) calls task(ctx, i) for every i in [0, n).
struct Parallel {
  void* pool;
  int threads;
  void (*run)(const Parallel& par, int64_t n, void (*task)(void* ctx, int64_t i), void* ctx);
};

// Scratch of the calling thread: kept and reused, 64-byte aligned, valid until this thread asks again.
void* thread_arena(size_t bytes);

enum class Isa : int { v2, v3, v4, v4bf16, none };
Isa active_isa();  // fixed at load

}  // namespace jaxext

#ifdef JAXEXT_KERNEL
namespace jaxext::JAXEXT_ISA {

// A lambda run over [0, n) on the threads of par; f(i) must not wait for another i.
template <class F>
JAXEXT_INLINE void parallel_for(const Parallel& par, int64_t n, const F& f) {
  if (n <= 0) return;
  if (n == 1 || par.threads <= 1) {
    for (int64_t i = 0; i < n; i++) f(i);
    return;
  }
  par.run(par, n, [](void* ctx, int64_t i) { (*static_cast<const F*>(ctx))(i); }, const_cast<F*>(&f));
}

// f(first, end) over `rows` rows of n elements in tasks of at least `least` elements, or of one row.
template <class F>
JAXEXT_INLINE void parallel_rows(const Parallel& par, int64_t rows, int64_t n, int64_t least, const F& f) {
  const int64_t each = n >= least ? 1 : least / n;
  parallel_for(par, (rows + each - 1) / each, [&](int64_t task) {
    f(task * each, (task + 1) * each < rows ? (task + 1) * each : rows);
  });
}

}  // namespace jaxext::JAXEXT_ISA
#endif

#ifdef JAXEXT_HANDLER
// JAXEXT_DECLARE(name, Args): declares `void name(const Args&, const Parallel&)` in every instruction set's namespace.
#define JAXEXT_DECLARE(name, Args)                                           \
  namespace jaxext {                                                         \
  namespace v2 { void name(const Args&, const Parallel&); }                  \
  namespace v3 { void name(const Args&, const Parallel&); }                  \
  namespace v4 { void name(const Args&, const Parallel&); }                  \
  namespace v4bf16 { void name(const Args&, const Parallel&); }              \
  }

// JAXEXT_DISPATCH(name)(args, par): the kernel of the instruction set chosen at load, among those compiled.
#if JAXEXT_COMPILED_V4BF16
#define JAXEXT_CHOOSE_V4BF16(name) jaxext::active_isa() == jaxext::Isa::v4bf16 ? jaxext::v4bf16::name :
#else
#define JAXEXT_CHOOSE_V4BF16(name)
#endif
#if JAXEXT_COMPILED_V4
#define JAXEXT_CHOOSE_V4(name) jaxext::active_isa() == jaxext::Isa::v4 ? jaxext::v4::name :
#else
#define JAXEXT_CHOOSE_V4(name)
#endif
#if JAXEXT_COMPILED_V3
#define JAXEXT_CHOOSE_V3(name) jaxext::active_isa() == jaxext::Isa::v3 ? jaxext::v3::name :
#else
#define JAXEXT_CHOOSE_V3(name)
#endif
#define JAXEXT_DISPATCH(name) \
  (JAXEXT_CHOOSE_V4BF16(name) JAXEXT_CHOOSE_V4(name) JAXEXT_CHOOSE_V3(name) jaxext::v2::name)
#endif
