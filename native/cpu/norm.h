// Layer and RMS normalisation of rows: arguments shared by the kernels and their handlers.
#pragma once
#include <cstdint>

namespace jaxext {

// A buffer of float or bf16 values; data == nullptr: absent.
struct NormBuffer {
  void* data;
  bool bf16;
};

struct NormForwardArgs {
  NormBuffer x, residual;  // [rows, features]; residual has x's type
  NormBuffer scale, bias;  // [features]
  NormBuffer out;          // [rows, features]
  NormBuffer sum;          // x + residual, in x's type; present with residual
  float *mean, *rstd;      // [rows]; mean is null where rows are not centred (RMS norm)
  int64_t rows, features;
  float epsilon, scale_offset;
};

struct NormBackwardArgs {
  NormBuffer x, grad;           // [rows, features]: the normalised value's argument, and its cotangent
  NormBuffer grad_sum;          // cotangent of x itself where x is also an output (residual add), in x's type
  NormBuffer scale;             // [features]
  const float *mean, *rstd;     // [rows]
  NormBuffer dx;                // [rows, features], in x's type; this and the next two absent where not wanted
  NormBuffer dscale, dbias;     // [features]
  int64_t rows, features;
  float scale_offset;
};

}  // namespace jaxext
