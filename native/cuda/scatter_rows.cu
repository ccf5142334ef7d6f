// Rows of a bfloat16 table added to by number: the gradient of an embedding. Updates come sorted by row. A block adds up
// those of one chunk; rows that it has alone are written, sums of a row that goes on in the chunk before or after are
// kept, and a second kernel adds these, chunk after chunk: the result does not depend on who comes first.
#include "cuda/scatter_rows.h"

#include "cuda/element.h"
#include "cuda/launch.h"

namespace jaxext::cuda {
namespace {

constexpr unsigned kMostThreads = 256;
constexpr int kAtOnce = 4;  // updates that a thread asks for before it adds the first

__device__ bool in_table(const ScatterRowsArgs& a, int64_t row) { return row >= 0 && row < a.rows; }

// Whether the update at `place` adds to the same row as the one before it.
__device__ bool continues(const ScatterRowsArgs& a, int64_t place) {
  return place > 0 && place < a.count && a.numbers[place] == a.numbers[place - 1];
}

template <int n>
__device__ void add_to_row(const ScatterRowsArgs& a, int64_t row, int64_t j, const Floats<n>& sum) {
  bf16* to = static_cast<bf16*>(a.table) + row * a.width + j;
  Floats<n> x = load<n>(to);
  for (int k = 0; k < n; k++) x.at[k] += sum.at[k];
  store<n>(to, x);
}

template <int n>
__device__ void keep(float* to, const Floats<n>& sum) {
  for (int k = 0; k < n; k++) to[k] = sum.at[k];
}

template <int n>
__global__ void add_chunks(ScatterRowsArgs a) {
  const int64_t first = blockIdx.x * kScatterChunk;
  const int64_t end = first + kScatterChunk < a.count ? first + kScatterChunk : a.count;
  const bool before = continues(a, first), after = continues(a, end);
  float* kept = a.scratch + blockIdx.x * 2 * a.width;  // of the first row, and of the last
  const bf16* updates = static_cast<const bf16*>(a.updates);
  for (int64_t j = threadIdx.x * n; j < a.width; j += blockDim.x * n) {
    Floats<n> sum = {};
    bool still_first = true;
    for (int64_t at = first; at < end; at += kAtOnce) {
      Floats<n> next[kAtOnce];
      for (int i = 0; i < kAtOnce; i++)
        if (at + i < end) next[i] = load<n>(updates + a.order[at + i] * a.width + j);
      for (int i = 0; i < kAtOnce && at + i < end; i++) {
        for (int k = 0; k < n; k++) sum.at[k] += next[i].at[k];
        const int64_t place = at + i, row = a.numbers[place];
        if (place + 1 < end && continues(a, place + 1)) continue;
        const bool last = place + 1 == end;
        if (still_first && before) keep<n>(kept + j, sum);
        else if (last && after) keep<n>(kept + a.width + j, sum);
        else if (in_table(a, row)) add_to_row<n>(a, row, j, sum);
        still_first = false;
        sum = {};
      }
    }
  }
}

// The rows that go on after a chunk, from the chunk in which they begin.
template <int n>
__global__ void join_chunks(ScatterRowsArgs a) {
  const int64_t first = blockIdx.x * kScatterChunk, end = first + kScatterChunk;
  if (end >= a.count || !continues(a, end)) return;
  const int64_t row = a.numbers[end - 1];
  if (!in_table(a, row) || (continues(a, first) && a.numbers[first] == row)) return;
  const int64_t chunks = (a.count + kScatterChunk - 1) / kScatterChunk;
  for (int64_t j = threadIdx.x * n; j < a.width; j += blockDim.x * n) {
    Floats<n> sum;
    for (int k = 0; k < n; k++) sum.at[k] = a.scratch[(blockIdx.x * 2 + 1) * a.width + j + k];
    for (int64_t chunk = blockIdx.x + 1; chunk < chunks && a.numbers[chunk * kScatterChunk] == row; chunk++)
      for (int k = 0; k < n; k++) sum.at[k] += a.scratch[chunk * 2 * a.width + j + k];
    add_to_row<n>(a, row, j, sum);
  }
}

template <int n>
void launch(const ScatterRowsArgs& a, CUstream_st* stream) {
  const int64_t chunks = (a.count + kScatterChunk - 1) / kScatterChunk;
  const unsigned threads = threads_for((a.width + n - 1) / n, kMostThreads);
  JAXEXT_LAUNCH((add_chunks<n>), chunks, threads, 0, stream, a);
  JAXEXT_LAUNCH((join_chunks<n>), chunks, threads, 0, stream, a);
}

}  // namespace

int scatter_rows(const ScatterRowsArgs& a, CUstream_st* stream) {
  constexpr int kPack = 8;
  if (a.width % kPack == 0 && aligned(a.table, a.updates)) launch<kPack>(a, stream);
  else launch<1>(a, stream);
  return cudaGetLastError();
}

}  // namespace jaxext::cuda
