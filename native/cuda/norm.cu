// Layer and RMS normalisation of rows, f32 statistics. A row's block reads it from memory once, and from the caches
// after that; dscale and dbias fall out of the backward's pass: a block sums its rows, a second kernel adds the blocks.
#include "cuda/norm.h"

#include "cuda/element.h"
#include "cuda/launch.h"

namespace jaxext::cuda {
namespace {

constexpr unsigned kMostThreads = 256;
constexpr int64_t kMostChunks = 512;
constexpr int kColumns = 32, kGroups = 8;  // of add_partials: columns of a block, and parts that each is summed in

template <int n>
__device__ Floats<n> parameter(const NormBuffer& from, int64_t j, float offset, float absent) {
  Floats<n> x;
  if (!from.data) {
    for (int k = 0; k < n; k++) x.at[k] = absent;
    return x;
  }
  x = from.bf16 ? load<n>(static_cast<const bf16*>(from.data) + j) : load<n>(static_cast<const float*>(from.data) + j);
  for (int k = 0; k < n; k++) x.at[k] += offset;
  return x;
}

template <bool kCentred, class X, class O, int n>
__global__ void forward_rows(NormForwardArgs a) {
  __shared__ float partial[kWarp];
  const int64_t first = blockIdx.x * a.features, step = blockDim.x * n;
  const float share = 1.f / static_cast<float>(a.features);
  const X* x = static_cast<const X*>(a.x.data) + first;
  float total = 0.f;
  if (a.residual.data) {
    const X* residual = static_cast<const X*>(a.residual.data) + first;
    X* sum = static_cast<X*>(a.sum.data) + first;
    for (int64_t j = threadIdx.x * n; j < a.features; j += step) {
      Floats<n> both = load<n>(x + j);
      const Floats<n> more = load<n>(residual + j);
      for (int k = 0; k < n; k++) both.at[k] += more.at[k];
      store<n>(sum + j, both);
    }
    x = sum;  // a thread reads only what it wrote itself
  }
  float mean = 0.f;
  if (kCentred) {
    for (int64_t j = threadIdx.x * n; j < a.features; j += step) {
      const Floats<n> v = load<n>(x + j);
      for (int k = 0; k < n; k++) total += v.at[k];
    }
    mean = block_sum(total, partial) * share;
  }
  float squares = 0.f;
  for (int64_t j = threadIdx.x * n; j < a.features; j += step) {
    const Floats<n> v = load<n>(x + j);
    for (int k = 0; k < n; k++) squares += (v.at[k] - mean) * (v.at[k] - mean);
  }
  const float rstd = 1.f / sqrtf(block_sum(squares, partial) * share + a.epsilon);
  O* out = static_cast<O*>(a.out.data) + first;
  for (int64_t j = threadIdx.x * n; j < a.features; j += step) {
    Floats<n> v = load<n>(x + j);
    const Floats<n> scale = parameter<n>(a.scale, j, a.scale_offset, 1.f + a.scale_offset);
    const Floats<n> bias = parameter<n>(a.bias, j, 0.f, 0.f);
    for (int k = 0; k < n; k++) v.at[k] = (v.at[k] - mean) * rstd * scale.at[k] + bias.at[k];
    store<n>(out + j, v);
  }
  if (threadIdx.x == 0) {
    if (kCentred) a.mean[blockIdx.x] = mean;
    a.rstd[blockIdx.x] = rstd;
  }
}

template <bool kCentred, class X, class O, int n>
__global__ void backward_rows(NormBackwardArgs a, float* partials) {
  JAXEXT_DYNAMIC_SHARED(columns);  // dscale, then dbias, of this block's rows; a thread's columns are its own
  __shared__ float partial[kWarp];
  const bool sums = a.dscale.data || a.dbias.data;
  const int64_t step = blockDim.x * n;
  const float share = 1.f / static_cast<float>(a.features);
  for (int64_t j = threadIdx.x * n; sums && j < a.features; j += step)
    for (int k = 0; k < n; k++) columns[j + k] = columns[a.features + j + k] = 0.f;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const X* x = static_cast<const X*>(a.x.data) + row * a.features;
    const O* grad = static_cast<const O*>(a.grad.data) + row * a.features;
    const float mean = kCentred ? a.mean[row] : 0.f, rstd = a.rstd[row];
    float along = 0.f, total = 0.f;
    for (int64_t j = threadIdx.x * n; j < a.features; j += step) {
      const Floats<n> v = load<n>(x + j), g = load<n>(grad + j);
      const Floats<n> scale = parameter<n>(a.scale, j, a.scale_offset, 1.f + a.scale_offset);
      for (int k = 0; k < n; k++) {
        const float normal = (v.at[k] - mean) * rstd, scaled = g.at[k] * scale.at[k];
        along += scaled * normal;
        if (kCentred) total += scaled;
        if (sums) {
          columns[j + k] += g.at[k] * normal;
          columns[a.features + j + k] += g.at[k];
        }
      }
    }
    if (!a.dx.data) continue;
    const float slope = block_sum(along, partial) * share;
    const float shift = kCentred ? block_sum(total, partial) * share : 0.f;
    X* dx = static_cast<X*>(a.dx.data) + row * a.features;
    for (int64_t j = threadIdx.x * n; j < a.features; j += step) {
      const Floats<n> v = load<n>(x + j), g = load<n>(grad + j);
      const Floats<n> scale = parameter<n>(a.scale, j, a.scale_offset, 1.f + a.scale_offset);
      Floats<n> d;
      for (int k = 0; k < n; k++)
        d.at[k] = rstd * (g.at[k] * scale.at[k] - shift - (v.at[k] - mean) * rstd * slope);
      if (a.grad_sum.data) {
        const Floats<n> more = load<n>(static_cast<const X*>(a.grad_sum.data) + row * a.features + j);
        for (int k = 0; k < n; k++) d.at[k] += more.at[k];
      }
      store<n>(dx + j, d);
    }
  }
  float* own = partials + blockIdx.x * 2 * a.features;
  for (int64_t j = threadIdx.x * n; sums && j < a.features; j += step) {
    for (int k = 0; k < n; k++) {
      own[j + k] = columns[j + k];
      own[a.features + j + k] = columns[a.features + j + k];
    }
  }
}

// to[j] = the sum of chunk c's partials[2 c features + j], in a fixed order.
template <class T>
__global__ void add_partials(const float* partials, int64_t chunks, int64_t features, T* to) {
  __shared__ float parts[kGroups * kColumns];
  const int column = threadIdx.x % kColumns, group = threadIdx.x / kColumns;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  float sum = 0.f;
  for (int64_t c = group; j < features && c < chunks; c += kGroups) sum += partials[c * 2 * features + j];
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (group != 0 || j >= features) return;
  for (int g = 1; g < kGroups; g++) sum += parts[g * kColumns + column];
  round_to(sum, to[j]);
}

void add_partials_to(NormBuffer to, const float* partials, int64_t chunks, int64_t features, CUstream_st* stream) {
  if (!to.data) return;
  const int64_t blocks = (features + kColumns - 1) / kColumns;
  if (to.bf16)
    JAXEXT_LAUNCH((add_partials<bf16>), blocks, kGroups * kColumns, 0, stream, partials, chunks, features,
                  static_cast<bf16*>(to.data));
  else
    JAXEXT_LAUNCH((add_partials<float>), blocks, kGroups * kColumns, 0, stream, partials, chunks, features,
                  static_cast<float*>(to.data));
}

template <bool kCentred, class X, class O>
void forward_for(const NormForwardArgs& a, CUstream_st* stream) {
  constexpr int kPack = 16 / sizeof(X);
  const bool packs = aligned(a.x.data, a.residual.data, a.scale.data, a.bias.data, a.out.data, a.sum.data);
  if (a.features % kPack == 0 && packs)
    JAXEXT_LAUNCH((forward_rows<kCentred, X, O, kPack>), a.rows, threads_for(a.features / kPack, kMostThreads), 0,
                  stream, a);
  else
    JAXEXT_LAUNCH((forward_rows<kCentred, X, O, 1>), a.rows, threads_for(a.features, kMostThreads), 0, stream, a);
}

template <bool kCentred, class X, class O>
void backward_for(const NormBackwardArgs& a, float* partials, CUstream_st* stream) {
  constexpr int kPack = 16 / sizeof(X);
  const bool sums = a.dscale.data || a.dbias.data;
  const int64_t chunks = norm_chunks(a.rows), shared = sums ? 2 * a.features * sizeof(float) : 0;
  if (a.features % kPack == 0 && aligned(a.x.data, a.grad.data, a.grad_sum.data, a.scale.data, a.dx.data))
    JAXEXT_LAUNCH((backward_rows<kCentred, X, O, kPack>), chunks, threads_for(a.features / kPack, kMostThreads),
                  shared, stream, a, partials);
  else
    JAXEXT_LAUNCH((backward_rows<kCentred, X, O, 1>), chunks, threads_for(a.features, kMostThreads), shared, stream, a,
                  partials);
  add_partials_to(a.dscale, partials, chunks, a.features, stream);
  add_partials_to(a.dbias, partials + a.features, chunks, a.features, stream);
}

template <bool kCentred>
int forward(const NormForwardArgs& a, CUstream_st* stream) {
  if (a.x.bf16 && a.out.bf16) forward_for<kCentred, bf16, bf16>(a, stream);
  else if (a.x.bf16) forward_for<kCentred, bf16, float>(a, stream);
  else if (a.out.bf16) forward_for<kCentred, float, bf16>(a, stream);
  else forward_for<kCentred, float, float>(a, stream);
  return cudaGetLastError();
}

template <bool kCentred>
int backward(const NormBackwardArgs& a, float* partials, CUstream_st* stream) {
  if (a.x.bf16 && a.grad.bf16) backward_for<kCentred, bf16, bf16>(a, partials, stream);
  else if (a.x.bf16) backward_for<kCentred, bf16, float>(a, partials, stream);
  else if (a.grad.bf16) backward_for<kCentred, float, bf16>(a, partials, stream);
  else backward_for<kCentred, float, float>(a, partials, stream);
  return cudaGetLastError();
}

}  // namespace

int64_t norm_chunks(int64_t rows) { return rows < kMostChunks ? (rows > 0 ? rows : 1) : kMostChunks; }

int layer_norm_forward(const NormForwardArgs& a, CUstream_st* stream) { return forward<true>(a, stream); }
int rms_norm_forward(const NormForwardArgs& a, CUstream_st* stream) { return forward<false>(a, stream); }
int layer_norm_backward(const NormBackwardArgs& a, float* partials, CUstream_st* stream) {
  return backward<true>(a, partials, stream);
}
int rms_norm_backward(const NormBackwardArgs& a, float* partials, CUstream_st* stream) {
  return backward<false>(a, partials, stream);
}

}  // namespace jaxext::cuda
