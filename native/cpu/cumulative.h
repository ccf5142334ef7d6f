// Running sums, products, maxima, minima and logarithms of sums of exponentials along one axis.
#pragma once
#include "element.h"
#include "isa.h"

namespace jaxext {

enum class CumulativeKind : int { sum, prod, max, min, logsumexp };

struct CumulativeArgs {
  const void* x;  // [outer, n, inner]
  void* out;      // likewise
  int64_t outer, n, inner;
  CumulativeKind kind;
  Element type;  // f32, bf16, i32 or u32; logsumexp: a float
  bool reverse;
};

}  // namespace jaxext
