// Starting kernels, and sums over a block. With JAXEXT_EMULATED the same sources run on the host (emulated.h).
#pragma once
#include <cstdint>
#include <type_traits>

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

// Every thread's x put together, in an order that depends on the block's size alone. partial: kWarp floats, shared.
template <class Together>
__device__ float over_block(float x, float* partial, Together together) {
  for (int distance = kWarp / 2; distance; distance /= 2) x = together(x, __shfl_xor_sync(~0u, x, distance));
  __syncthreads();  // the last result may still be being read
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  float result = partial[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; warp++) result = together(result, partial[warp]);
  return result;
}

__device__ inline float block_sum(float x, float* partial) {
  return over_block(x, partial, [](float a, float b) { return a + b; });
}

__device__ inline float block_max(float x, float* partial) {
  return over_block(x, partial, [](float a, float b) { return fmaxf(a, b); });
}

// Calls body(width, j) for the elements j..j + width - 1 of a row, all of them once over the block: n at a time where
// they are aligned, given that element 0 of the array is; `first` is the row's first element.
template <int n, class Body>
__device__ void over_row(int64_t first, int64_t count, const Body& body) {
  const int64_t off = first % n ? n - first % n : 0, head = off < count ? off : count;
  const int64_t packs = (count - head) / n, rest = head + packs * n, thread = threadIdx.x;
  if (thread < head) body(std::integral_constant<int, 1>{}, thread);
  for (int64_t p = thread; p < packs; p += blockDim.x) body(std::integral_constant<int, n>{}, head + p * n);
  if (thread < count - rest) body(std::integral_constant<int, 1>{}, rest + thread);
}

// Whether all of these, null for none, can be read in packs of 16 bytes.
template <class... Address>
bool aligned(const Address*... at) {
  return (reinterpret_cast<uintptr_t>(at) | ...) % 16 == 0;
}

// Whole warps, as many threads as there are packs in a row, at most `most`.
inline unsigned threads_for(int64_t packs, unsigned most) {
  const int64_t warps = (packs + kWarp - 1) / kWarp, most_warps = most / kWarp;
  return static_cast<unsigned>((warps < most_warps ? warps : most_warps) * kWarp);
}

}  // namespace jaxext::cuda
