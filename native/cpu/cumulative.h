// Running sums, products, maxima and minima along one axis.
#pragma once
#include "isa.h"

namespace jaxext {

enum class CumulativeKind : int { sum, prod, max, min };

struct CumulativeArgs {
  const void* x;  // [outer, n, inner]
  void* out;      // likewise
  int64_t outer, n, inner;
  CumulativeKind kind;
  bool bf16;     // else f32
  bool reverse;
};

}  // namespace jaxext
