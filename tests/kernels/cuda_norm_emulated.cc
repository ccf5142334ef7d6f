// native/cuda/norm.cu on the host, with a C face for ctypes. Compiled by tests/kernels/test_cuda_norm.py.
#include "cuda/norm.cu"

using jaxext::NormBackwardArgs;
using jaxext::NormBuffer;
using jaxext::NormForwardArgs;

namespace {
// Buffers come as pairs of a pointer and whether it is bf16.
NormBuffer buffer(void* const* data, const int* bf16, int i) { return {data[i], bf16[i] != 0}; }
}  // namespace

extern "C" int64_t chunks(int64_t rows) { return jaxext::cuda::norm_chunks(rows); }

// data: x, residual, scale, bias, out, sum, mean, rstd.
extern "C" void forward(bool centred, void* const* data, const int* bf16, int64_t rows, int64_t features, float epsilon,
                        float offset) {
  NormForwardArgs a{buffer(data, bf16, 0), buffer(data, bf16, 1), buffer(data, bf16, 2), buffer(data, bf16, 3),
                    buffer(data, bf16, 4), buffer(data, bf16, 5), static_cast<float*>(data[6]),
                    static_cast<float*>(data[7]), rows, features, epsilon, offset};
  centred ? jaxext::cuda::layer_norm_forward(a, nullptr) : jaxext::cuda::rms_norm_forward(a, nullptr);
}

// data: x, grad, grad_sum, scale, mean, rstd, dx, dscale, dbias, partials.
extern "C" void backward(bool centred, void* const* data, const int* bf16, int64_t rows, int64_t features,
                         float offset) {
  NormBackwardArgs a{buffer(data, bf16, 0), buffer(data, bf16, 1), buffer(data, bf16, 2), buffer(data, bf16, 3),
                     static_cast<const float*>(data[4]), static_cast<const float*>(data[5]), buffer(data, bf16, 6),
                     buffer(data, bf16, 7), buffer(data, bf16, 8), rows, features, offset};
  float* partials = static_cast<float*>(data[9]);
  centred ? jaxext::cuda::layer_norm_backward(a, partials, nullptr)
          : jaxext::cuda::rms_norm_backward(a, partials, nullptr);
}
