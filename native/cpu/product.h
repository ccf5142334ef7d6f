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
  ProductOperand a, b;  // [batch, m, k] and [batch, k, n]
  void* out;            // [batch, m, n], float or bf16
  int64_t batch, m, n, k;
  bool out_bf16;
  bool adds;    // out += a b; out is float
  bool rounds;  // operands may be rounded to bf16
};

}  // namespace jaxext
