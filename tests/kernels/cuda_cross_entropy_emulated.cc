// native/cuda/cross_entropy.cu on the host, with a C face for ctypes. Compiled by tests/kernels/test_cuda_cross_entropy.py.
#include "cuda/cross_entropy.cu"

// data: logits, labels, loss, normalizer, grad, dlogits.
extern "C" void run(void* const* data, const int* bf16, int64_t rows, int64_t classes, float smoothing, bool one_hot) {
  auto buffer = [&](int i) { return jaxext::LogitBuffer{data[i], bf16[i] != 0}; };
  jaxext::cuda::cross_entropy({buffer(0), static_cast<const int32_t*>(data[1]), buffer(2), static_cast<float*>(data[3]),
                               buffer(4), buffer(5), rows, classes, smoothing, one_hot},
                              nullptr);
}
