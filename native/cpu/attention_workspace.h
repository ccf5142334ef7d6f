// Memory of one attention call that its tasks share: operands packed once, partial sums.
#pragma once
#include <cstddef>

namespace jaxext {

// 64-byte aligned, from blocks kept between calls; each block serves one call at a time.
void* acquire_workspace(size_t bytes);
void release_workspace(void* workspace);

}  // namespace jaxext

#ifdef JAXEXT_HANDLER
#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <utility>

#include "sanitized.h"

namespace jaxext {

constexpr size_t kWorkspacePage = size_t{2} << 20;
constexpr int kKeptWorkspaces = 4;

struct WorkspacePool {
  struct Block {
    void* data;
    size_t size;
  };
  std::mutex mutex;  // held to look through the list, never while a kernel runs
  Block kept[kKeptWorkspaces] = {};

  // A kept block of at least `bytes`, the smallest such; otherwise an empty one.
  Block take(size_t bytes) {
    std::lock_guard lock(mutex);
    Block* best = nullptr;
    for (Block& b : kept)
      if (b.data && b.size >= bytes && (!best || b.size < best->size)) best = &b;
    return best ? std::exchange(*best, Block{}) : Block{};
  }

  // Keeps the block in the place of the smallest, which is returned to be freed.
  Block keep(Block block) {
    std::lock_guard lock(mutex);
    Block* smallest = &kept[0];
    for (Block& b : kept)
      if (b.size < smallest->size) smallest = &b;
    return block.size > smallest->size ? std::exchange(*smallest, block) : block;
  }
};

inline WorkspacePool& workspace_pool() {
  static WorkspacePool pool;
  return pool;
}

// The 64 bytes before the data hold the size of the block.
void* acquire_workspace(size_t bytes) {
  size_t size = (bytes + 64 + kWorkspacePage - 1) / kWorkspacePage * kWorkspacePage;
  auto block = workspace_pool().take(size);
  if (!block.data) {
    block = {aligned_alloc(kWorkspacePage, size), size};
    if (!block.data) abort();
    madvise(block.data, size, MADV_HUGEPAGE);
  }
  limit_use(block.data, bytes + 64, block.size);
  *static_cast<size_t*>(block.data) = block.size;
  return static_cast<char*>(block.data) + 64;
}

void release_workspace(void* workspace) {
  void* data = static_cast<char*>(workspace) - 64;
  const size_t size = *static_cast<size_t*>(data);
  limit_use(data, 0, size);
  free(workspace_pool().keep({data, size}).data);
}

}  // namespace jaxext
#endif
