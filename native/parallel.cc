#include "parallel.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "sanitized.h"

namespace jaxext {
namespace {

struct Work {
  std::atomic<int64_t> next{0}, done{0};
  int64_t n;
  void (*task)(void*, int64_t);
  void* ctx;

  // Tasks that the pool starts after the caller has left find next >= n and touch nothing of the caller's.
  void drain() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
      task(ctx, i);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

constexpr size_t kHugePage = size_t{2} << 20;

struct Arena {
  void* data = nullptr;
  size_t size = 0;
  ~Arena() { free(data); }
};

}  // namespace

void run_on_pool(const Parallel& par, int64_t n, void (*task)(void*, int64_t), void* ctx) {
  auto work = std::make_shared<Work>();
  work->n = n;
  work->task = task;
  work->ctx = ctx;
  auto* pool = static_cast<xla::ffi::ThreadPool*>(par.pool);
  int64_t helpers = std::min<int64_t>(par.threads, n) - 1;
  for (int64_t i = 0; i < helpers; i++) pool->Schedule([work] { work->drain(); });
  work->drain();
  while (work->done.load(std::memory_order_acquire) < n) __builtin_ia32_pause();
}

void* thread_arena(size_t bytes) {
  static thread_local Arena arena;
  if (bytes > arena.size) {
    free(arena.data);
    size_t align = bytes >= kHugePage ? kHugePage : 64;
    arena.size = (bytes + align - 1) / align * align;
    arena.data = aligned_alloc(align, arena.size);
    if (!arena.data) abort();
    if (align == kHugePage) madvise(arena.data, arena.size, MADV_HUGEPAGE);
  }
  limit_use(arena.data, bytes, arena.size);
  return arena.data;
}

}  // namespace jaxext
