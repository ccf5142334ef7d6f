// Depthwise convolution of images whose channels come last, and the gradient of its kernel.
#pragma once
#include "isa.h"

namespace jaxext {

struct DepthwiseArgs {
  const void* x;      // [n, h, w, c]
  const void* other;  // the kernel [kh, kw, c]; in the gradient, the result's cotangent [n, oh, ow, c]
  void* out;          // the result [n, oh, ow, c]; in the gradient, the kernel's cotangent [kh, kw, c]
  int64_t n, h, w, c, kh, kw, oh, ow;
  // Tap k of place o is at o * stride + k * dilation - low in x, whose elements are `base` places apart.
  int64_t stride[2], dilation[2], base[2], low[2];
  bool bf16;  // else f32
};

}  // namespace jaxext
