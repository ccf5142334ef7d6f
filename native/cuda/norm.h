// Layer and RMS normalisation on a CUDA stream. Each returns cudaSuccess (0), or why a launch failed.
#pragma once
#include "cpu/norm.h"

struct CUstream_st;

namespace jaxext::cuda {

// Rows are summed over by this many blocks at most, whose sums are then added in order: dscale and dbias do not depend
// on the device. `partials` has room for norm_chunks(rows) x [dscale, dbias] x features floats.
int64_t norm_chunks(int64_t rows);

int layer_norm_forward(const NormForwardArgs& a, CUstream_st* stream);
int rms_norm_forward(const NormForwardArgs& a, CUstream_st* stream);
int layer_norm_backward(const NormBackwardArgs& a, float* partials, CUstream_st* stream);
int rms_norm_backward(const NormBackwardArgs& a, float* partials, CUstream_st* stream);

}  // namespace jaxext::cuda
