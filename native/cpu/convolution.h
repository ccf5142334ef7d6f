// Convolution of images whose channels come last, and the gradient of its kernel.
#pragma once
#include "isa.h"

namespace jaxext {

struct ConvolutionArgs {
  const float* x;      // [n, h, w, c]
  const float* other;  // the kernel [kh, kw, c, f]; in the gradient, the result's cotangent [n, oh, ow, f]
  float* out;          // the result [n, oh, ow, f]; in the gradient, the kernel's cotangent [kh, kw, c, f]
  int64_t n, h, w, c, kh, kw, oh, ow, f;
  // Tap k of place o is at o * stride + k * dilation - low in x, whose elements are `base` places apart.
  int64_t stride[2], dilation[2], base[2], low[2];
  bool turned;    // the kernel is stored as [kh, kw, f, c]
  bool reversed;  // the kernel's rows and columns are stored last first
};

}  // namespace jaxext
