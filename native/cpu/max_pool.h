// Largest elements of windows over two dimensions, and the gradient of that.
#pragma once
#include "isa.h"

namespace jaxext {

struct WindowedDimension {
  int64_t in, out, window, stride, before;  // `before`: padding in front
};

struct MaxPoolArgs {
  const void* x;         // [batch, rows.in, columns.in, inner]
  const void* gradient;  // [batch, rows.out, columns.out, inner]; null: forward
  void* out;             // as x for the gradient, else as `gradient` would be
  int64_t batch, inner;
  WindowedDimension rows, columns;
  bool bf16;  // else f32
};

}  // namespace jaxext
