// What norms do with the vectors of their features: widened before, their gradients summed after.
#pragma once
#include "norm.h"
#include "rows.h"

namespace jaxext::JAXEXT_ISA {
namespace {

#define JAXEXT_BODY [&](int64_t j, auto part, int k) __attribute__((always_inline))

// Parameters as floats, with the offset added; `absent` where there are none.
void widen_parameter(NormBuffer from, int64_t n, float offset, float absent, float* to) {
  if (!from.data) {
    for (int64_t j = 0; j < n; j++) to[j] = absent;
  } else if (from.bf16) {
    auto* p = static_cast<const bf16*>(from.data);
    over_row(n, JAXEXT_BODY { part.put(to + j, part.get(p + j) + splat(offset)); });
  } else {
    auto* p = static_cast<const float*>(from.data);
    over_row(n, JAXEXT_BODY { part.put(to + j, part.get(p + j) + splat(offset)); });
  }
}

// to = the sum of `chunks` rows `stride` apart, in order.
template <class T>
void add_chunks(const float* partial, int64_t chunks, int64_t stride, int64_t n, const Parallel& par, T* to) {
  constexpr int64_t kBlock = 256;
  parallel_for(threads_for(par, chunks * n), (n + kBlock - 1) / kBlock, [&](int64_t block) {
    const int64_t first = block * kBlock, count = n - first < kBlock ? n - first : kBlock;
    over_row(count, JAXEXT_BODY {
      vf sum = {};
      for (int64_t c = 0; c < chunks; c++) sum += part.get(partial + c * stride + first + j);
      part.put(to + first + j, sum);
    });
  });
}

void add_chunks_to(NormBuffer to, const float* partial, int64_t chunks, int64_t stride, int64_t n,
                   const Parallel& par) {
  if (to.data && to.bf16) add_chunks(partial, chunks, stride, n, par, static_cast<bf16*>(to.data));
  if (to.data && !to.bf16) add_chunks(partial, chunks, stride, n, par, static_cast<float*>(to.data));
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
