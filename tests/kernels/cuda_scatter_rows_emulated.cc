// native/cuda/scatter_rows.cu on the host, with a C face for ctypes. Compiled by tests/kernels/test_cuda_scatter_rows.py.
#include "cuda/scatter_rows.cu"

extern "C" int64_t chunk() { return jaxext::cuda::kScatterChunk; }

// data: table, numbers, order, updates, scratch.
extern "C" void run(void* const* data, int64_t rows, int64_t width, int64_t count) {
  jaxext::cuda::scatter_rows({data[0], static_cast<const int32_t*>(data[1]), static_cast<const int32_t*>(data[2]),
                              data[3], static_cast<float*>(data[4]), rows, width, count},
                             nullptr);
}
