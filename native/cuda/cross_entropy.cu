// Softmax cross-entropy of rows of logits, in f32 whatever the storage. A row's block finds maximum and sum of
// exponentials in one reading (each thread its own, then both are put together), and writes the gradient in a second
// one, which finds in the second-level cache what the first has left there.
#include "cuda/cross_entropy.h"

#include "cuda/element.h"
#include "cuda/launch.h"

namespace jaxext::cuda {
namespace {

constexpr unsigned kMostThreads = 1024;  // two blocks of a multiprocessor, whose rows the cache can hold
constexpr float kLeast = -3.402823466e38f;

// The class a label names, or -1.
__device__ int64_t class_of(const CrossEntropyArgs& a, int64_t row) {
  int64_t y = a.labels[row];
  if (y < 0 && !a.one_hot) y += a.classes;
  return y >= 0 && y < a.classes ? y : -1;
}

// What one reading of a row finds.
struct Sums {
  float top = kLeast, exponentials = 0.f;  // below the maximum
  float all = 0.f, least = 0.f, nans = 0.f;  // the logits' sum; how many are -infinity, and no number

  template <int n>
  __device__ void add(const Floats<n>& x) {
    float most = x.at[0];
    for (int k = 1; k < n; k++) most = fmaxf(most, x.at[k]);
    if (most > top) {
      exponentials *= expf(top - most);
      top = most;
    }
    for (int k = 0; k < n; k++) {
      exponentials += expf(x.at[k] - top);
      all += x.at[k];
      least += x.at[k] == -INFINITY;
      nans += x.at[k] != x.at[k];
    }
  }

  // Every thread's together.
  __device__ void join(float* partial) {
    const float most = block_max(top, partial);
    if (most > top) exponentials *= expf(top - most);
    top = most;
    exponentials = block_sum(exponentials, partial);
    all = block_sum(all, partial);
    least = block_sum(least, partial);
    nans = block_sum(nans, partial);
  }
};

__device__ float loss_of(const CrossEntropyArgs& a, int64_t y, float own, const Sums& found, float top, float below) {
  const float smooth = a.smoothing, mean = found.all / static_cast<float>(a.classes);
  const bool infinite = found.top == INFINITY;
  if (y < 0 && (infinite || !a.one_hot)) return NAN;
  if (infinite) {
    if (a.one_hot) return NAN;
    return smooth == 0.f ? top - own : (1.f - smooth) * (top - own) + smooth * (top - mean);
  }
  const float loss = y < 0 ? 0.f : below + (top - own);
  if (smooth != 0.f) return (1.f - smooth) * loss + smooth * (below + (top - mean));
  // A one-hot product multiplies every log-probability: an infinite one that is not the label's gives 0 * infinity.
  const float allowed = y >= 0 && own == -INFINITY ? 1.f : 0.f;
  return a.one_hot && found.least > allowed ? NAN : loss;
}

__device__ void set(const LogitBuffer& to, int64_t i, float x) {
  if (to.bf16) round_to(x, static_cast<bf16*>(to.data)[i]);
  else static_cast<float*>(to.data)[i] = x;
}

__device__ float get(const LogitBuffer& from, int64_t i) {
  return from.bf16 ? as_float(static_cast<const bf16*>(from.data)[i]) : static_cast<const float*>(from.data)[i];
}

template <int n, class X>
__device__ void forward(const CrossEntropyArgs& a, const X* x, int64_t y, float own, float& top, float& below) {
  __shared__ float partial[kWarp];
  Sums found;
  over_row<n>(blockIdx.x * a.classes, a.classes, [&](auto width, int64_t j) { found.add(load<width.value>(x + j)); });
  found.join(partial);
  // As jax.nn.logsumexp: infinite where a logit is.
  const bool infinite = found.top == INFINITY;
  top = infinite && found.nans > 0.f ? NAN : found.top;
  below = infinite ? 0.f : logf(found.exponentials);
  if (threadIdx.x != 0) return;
  a.normalizer[2 * blockIdx.x] = top;
  a.normalizer[2 * blockIdx.x + 1] = below;
  set(a.loss, blockIdx.x, loss_of(a, y, own, found, top, below));
}

template <int n, class X, class D>
__device__ void backward(const CrossEntropyArgs& a, const X* x, D* dx, int64_t y, float top, float below) {
  const float g = get(a.grad, blockIdx.x), sure = g * (1.f - a.smoothing), spread = g * a.smoothing;
  const float share = a.one_hot && y < 0 ? spread : g, each = 1.f / static_cast<float>(a.classes);
  over_row<n>(blockIdx.x * a.classes, a.classes, [&](auto width, int64_t j) {
    Floats<width.value> v = load<width.value>(x + j);
    for (int k = 0; k < width.value; k++) {
      const float p = expf(v.at[k] - top - below);
      // Differences of probabilities first: next to 1 they are exact, and with one class 0.
      v.at[k] = j + k == y ? (p - 1.f) * sure + (p - each) * spread : p * share - spread * each;
    }
    store<width.value>(dx + j, v);
  });
}

template <bool kLoss, bool kGradient, int n, class X, class D>
__global__ void rows(CrossEntropyArgs a) {
  const X* x = static_cast<const X*>(a.logits.data) + blockIdx.x * a.classes;
  const int64_t y = class_of(a, blockIdx.x);
  const float own = y < 0 ? 0.f : as_float(x[y]);
  float top = 0.f, below = 0.f;
  if (kLoss) {
    forward<n>(a, x, y, own, top, below);
  } else {
    top = a.normalizer[2 * blockIdx.x];
    below = a.normalizer[2 * blockIdx.x + 1];
  }
  if (kGradient) backward<n>(a, x, static_cast<D*>(a.dlogits.data) + blockIdx.x * a.classes, y, top, below);
}

template <bool kLoss, bool kGradient, class X, class D>
void launch(const CrossEntropyArgs& a, CUstream_st* stream) {
  constexpr int kPack = 16 / sizeof(X);
  if (aligned(a.logits.data, a.dlogits.data))
    JAXEXT_LAUNCH((rows<kLoss, kGradient, kPack, X, D>), a.rows, threads_for(a.classes / kPack + 1, kMostThreads), 0,
                  stream, a);
  else
    JAXEXT_LAUNCH((rows<kLoss, kGradient, 1, X, D>), a.rows, threads_for(a.classes, kMostThreads), 0, stream, a);
}

template <bool kLoss, class X>
void launch_for(const CrossEntropyArgs& a, CUstream_st* stream) {
  if (!a.dlogits.data) launch<kLoss, false, X, X>(a, stream);
  else if (a.dlogits.bf16) launch<kLoss, true, X, bf16>(a, stream);
  else launch<kLoss, true, X, float>(a, stream);
}

}  // namespace

int cross_entropy(const CrossEntropyArgs& a, CUstream_st* stream) {
  const bool loss = a.loss.data;
  if (a.logits.bf16) loss ? launch_for<true, bf16>(a, stream) : launch_for<false, bf16>(a, stream);
  else loss ? launch_for<true, float>(a, stream) : launch_for<false, float>(a, stream);
  return cudaGetLastError();
}

}  // namespace jaxext::cuda
