// Threads for a handler: XLA's own intra-op pool, used so that no task ever waits for a queued one.
#pragma once
#include "isa.h"
#include "xla/ffi/api/ffi.h"

namespace jaxext {

// The caller drains the shared counter itself and then waits only for tasks that another thread has already begun;
// waiting for a queued task deadlocks as soon as every pool thread does so.
void run_on_pool(const Parallel& par, int64_t n, void (*task)(void*, int64_t), void* ctx);

inline Parallel parallel(xla::ffi::ThreadPool& pool) {
  return Parallel{&pool, static_cast<int>(pool.num_threads()), run_on_pool};
}

}  // namespace jaxext
