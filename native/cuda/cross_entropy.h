// Softmax cross-entropy with integer labels on a CUDA stream.
#pragma once
#include "cpu/cross_entropy.h"

struct CUstream_st;

namespace jaxext::cuda {

// With a loss: writes losses and normalizers; without one it reads the normalizers. With dlogits: writes the gradients
// for the cotangents in `grad`; dlogits may be the logits themselves where both have one type. Returns cudaSuccess (0),
// or why the launch failed.
int cross_entropy(const CrossEntropyArgs& a, CUstream_st* stream);

}  // namespace jaxext::cuda
