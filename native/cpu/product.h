// Matrix product with float32 accumulation: arguments shared by the kernel and its handler.
#pragma once
#include "isa.h"

namespace jaxext {

// A matrix of float or bf16 values; turned: its transpose is what is stored. Dense.
struct ProductOperand {
  const void* data;
  bool bf16, turned;
};

struct ProductArgs {
  ProductOperand a, b;  // [m, k] and [k, n]
  float* out;           // [m, n]
  int64_t m, n, k;
  bool adds;    // out += a b
  bool rounds;  // operands may be rounded to bf16
};

}  // namespace jaxext
