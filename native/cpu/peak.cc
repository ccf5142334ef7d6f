// The machine's own limits, measured: fused multiply-adds per second and bytes copied per second.
#include "peak.h"

#ifdef JAXEXT_KERNEL
#include "vec.h"

namespace jaxext::JAXEXT_ISA {
namespace {

// Independent accumulators: enough to cover latency x throughput, few enough to stay in registers.
#if defined(__AVX512F__)
constexpr int kChains = 24;
JAXEXT_INLINE void touch(vf& x) { asm volatile("" : "+v"(x)); }
#else
constexpr int kChains = 12;
JAXEXT_INLINE void touch(vf& x) { asm volatile("" : "+x"(x)); }
#endif

JAXEXT_NOINLINE float fma_f32(int64_t rounds) {
  vf acc[kChains], a = splat(1e-3f), b = splat(0.5f);
  touch(a), touch(b);
  JAXEXT_UNROLL
  for (int j = 0; j < kChains; j++) acc[j] = splat(0.1f * static_cast<float>(j));
  for (int64_t i = 0; i < rounds; i++) {
    JAXEXT_UNROLL
    for (int j = 0; j < kChains; j++) acc[j] = fma(acc[j], a, b);
  }
  vf s = splat(0);
  JAXEXT_UNROLL
  for (int j = 0; j < kChains; j++) s += acc[j];
  return reduce_add(s);
}

#if defined(__AVX512BF16__)
JAXEXT_NOINLINE float fma_bf16(int64_t rounds) {
  vf acc[kChains], a = splat(1e-3f), b = splat(0.5f);
  touch(a), touch(b);
  JAXEXT_UNROLL
  for (int j = 0; j < kChains; j++) acc[j] = splat(0.1f * static_cast<float>(j));
  for (int64_t i = 0; i < rounds; i++) {
    JAXEXT_UNROLL
    for (int j = 0; j < kChains; j++) acc[j] = (vf)_mm512_dpbf16_ps((__m512)acc[j], (__m512bh)a, (__m512bh)b);
  }
  vf s = splat(0);
  JAXEXT_UNROLL
  for (int j = 0; j < kChains; j++) s += acc[j];
  return reduce_add(s);
}
#endif

}  // namespace

// A slice of work for one thread; returns the FLOPs or bytes done. bf16 without its own instruction counts as f32.
void peak_work(const PeakArgs& args, const Parallel&) {
  float sink = 0;
  if (args.kind == PeakKind::copy) {
    memcpy(args.destination, args.source, args.bytes);
    *args.done += 2.0 * static_cast<double>(args.bytes);
#if defined(__AVX512BF16__)
  } else if (args.kind == PeakKind::bf16) {
    sink = fma_bf16(args.rounds);
    *args.done += 4.0 * kLanes * kChains * static_cast<double>(args.rounds);
#endif
  } else {
    sink = fma_f32(args.rounds);
    *args.done += 2.0 * kLanes * kChains * static_cast<double>(args.rounds);
  }
  asm volatile("" : : "x"(sink));
}

}  // namespace jaxext::JAXEXT_ISA
#endif
