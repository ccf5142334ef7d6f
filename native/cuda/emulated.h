// CUDA's threads on the host, for tests of kernels where there is no card: the blocks one after the other, a block's
// threads as fibers that take turns. Every barrier and every exchange within a warp is a turn, so all threads of a block
// must come to the same ones, as CUDA asks of barriers too. Races between barriers do not show.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one block runs at a time
#define JAXEXT_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  jaxext::cuda::emulated::run(blocks, threads, shared, [=] { kernel(__VA_ARGS__); })
#define JAXEXT_DYNAMIC_SHARED(name) float* name = jaxext::cuda::emulated::machine().shared.data()

namespace jaxext::cuda::emulated {

struct Index {
  unsigned x = 0;
};

struct Machine {
  ucontext_t scheduler;
  std::vector<ucontext_t> fibers;
  std::vector<bool> done;
  std::vector<float> shared, exchanged;
  std::function<void()> body;
  Index thread, block, threads, blocks;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void turn() {
  Machine& m = machine();
  const unsigned self = m.thread.x;
  swapcontext(&m.fibers[self], &m.scheduler);
  m.thread.x = self;
}

inline void enter() {
  Machine& m = machine();
  m.body();
  m.done[m.thread.x] = true;
}

inline void run(int64_t blocks, unsigned threads, int64_t shared, std::function<void()> body) {
  constexpr size_t kStack = 1 << 16;
  Machine& m = machine();
  m.body = std::move(body);
  m.threads.x = threads;
  m.blocks.x = static_cast<unsigned>(blocks);
  m.shared.assign(shared / sizeof(float) + 1, NAN);  // as undefined as on the card
  m.exchanged.assign(threads, NAN);
  m.fibers.resize(threads);
  std::unique_ptr<char[]> stacks(new char[kStack * threads]);
  for (m.block.x = 0; m.block.x < m.blocks.x; m.block.x++) {
    m.done.assign(threads, false);
    for (unsigned t = 0; t < threads; t++) {
      getcontext(&m.fibers[t]);
      m.fibers[t].uc_stack.ss_sp = stacks.get() + kStack * t;
      m.fibers[t].uc_stack.ss_size = kStack;
      m.fibers[t].uc_link = &m.scheduler;
      makecontext(&m.fibers[t], enter, 0);
    }
    for (bool left = true; left;) {
      left = false;
      for (unsigned t = 0; t < threads; t++) {
        if (m.done[t]) continue;
        m.thread.x = t;
        swapcontext(&m.scheduler, &m.fibers[t]);
        left = left || !m.done[t];
      }
    }
  }
}

inline float exchange(float x, int distance) {
  Machine& m = machine();
  m.exchanged[m.thread.x] = x;
  turn();
  const float found = m.exchanged[m.thread.x ^ static_cast<unsigned>(distance)];
  turn();
  return found;
}

}  // namespace jaxext::cuda::emulated

#define threadIdx jaxext::cuda::emulated::machine().thread
#define blockIdx jaxext::cuda::emulated::machine().block
#define blockDim jaxext::cuda::emulated::machine().threads
#define gridDim jaxext::cuda::emulated::machine().blocks
#define __syncthreads() jaxext::cuda::emulated::turn()
#define __shfl_xor_sync(mask, x, distance) jaxext::cuda::emulated::exchange(x, distance)
inline int cudaGetLastError() { return 0; }
