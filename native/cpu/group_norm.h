// Group normalisation of images whose channels come last: arguments shared by the kernels and their handlers.
#pragma once
#include "norm.h"

namespace jaxext {

// A group is channels / groups neighbouring channels of all pixels of one image.
struct GroupNormShape {
  int64_t images, pixels, channels, groups;
};

struct GroupNormForwardArgs {
  NormBuffer x, out;       // [images, pixels, channels]
  NormBuffer scale, bias;  // [channels], or absent
  float *mean, *rstd;      // [images, groups]
  GroupNormShape shape;
  float epsilon;
};

struct GroupNormBackwardArgs {
  NormBuffer x, grad;           // [images, pixels, channels]: the argument, and the result's cotangent
  NormBuffer scale;             // [channels], or absent
  const float *mean, *rstd;     // [images, groups]
  NormBuffer dx;                // [images, pixels, channels], in x's type; this and the next two absent where not wanted
  NormBuffer dscale, dbias;     // [channels]
  GroupNormShape shape;
};

}  // namespace jaxext
