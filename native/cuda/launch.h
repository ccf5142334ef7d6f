// Starting kernels, and sums over a block. With JAXEXT_EMULATED the same sources run on the host (emulated.h).
#pragma once
#include <cstdint>

#ifdef JAXEXT_EMULATED
#include "cuda/emulated.h"
#else
#include <cuda_runtime.h>
// kernel: in parentheses where it has commas. Shared memory is in bytes.
#define JAXEXT_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(__VA_ARGS__)
#define JAXEXT_DYNAMIC_SHARED(name) extern __shared__ float name[]
#endif

namespace jaxext::cuda {

constexpr int kWarp = 32;

// The sum of every thread's x, in an order that depends on the block's size alone. partial: kWarp floats, shared.
__device__ inline float block_sum(float x, float* partial) {
  for (int distance = kWarp / 2; distance; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  __syncthreads();  // the last sum may still be being read
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0.f;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; warp++) sum += partial[warp];
  return sum;
}

// Whole warps, as many threads as there are packs in a row, at most `most`.
inline unsigned threads_for(int64_t packs, unsigned most) {
  const int64_t warps = (packs + kWarp - 1) / kWarp, most_warps = most / kWarp;
  return static_cast<unsigned>((warps < most_warps ? warps : most_warps) * kWarp);
}

}  // namespace jaxext::cuda
