// What AddressSanitizer cannot see by itself: accesses by intrinsics, and the end of scratch that is kept for reuse.
// Nothing in an ordinary build.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace jaxext {

// An intrinsic is about to read or write `bytes` at p.
inline __attribute__((always_inline)) void touch([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  if (bytes == 0) return;
  const auto* byte = static_cast<const volatile char*>(p);
  (void)byte[0];
  (void)byte[bytes - 1];
#endif
}

// Of a block of `size` bytes, only the first `bytes` may be used until the next call.
inline __attribute__((always_inline)) void limit_use([[maybe_unused]] void* block, [[maybe_unused]] size_t bytes, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(block, size);
  ASAN_UNPOISON_MEMORY_REGION(block, bytes);
#endif
}

}  // namespace jaxext
