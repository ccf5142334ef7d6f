// A pool of large blocks that are kept for the next request, so that a training step faults no page twice.
#pragma once
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

namespace jaxext {

// One reserved range of addresses, cut into blocks of size classes, eight for each doubling. A free block waits in its
// class, its pages in place. What is kept is bounded: live and kept bytes together stay within 1.25 times the most that
// was live of late, plus 64 MiB; beyond, the blocks that have waited longest lose their pages but not their addresses.
// A large request waits a little for a block in use that would do: XLA tells that a step is done before it frees what the
// step had, and the next step, begun meanwhile, would need as much again and keep it.
class BlockPool {
 public:
  static constexpr size_t smallest = size_t{64} << 10;
  static constexpr size_t most_alignment = 4096;

  struct Counts {
    size_t live;     // bytes in use, rounded up to their classes
    size_t kept;     // bytes of free blocks with their pages in place
    size_t reused;   // requests answered by a kept block
    size_t fresh;    // requests that needed new pages
  };

  // False where the address range cannot be reserved; the pool then answers no request.
  bool reserve(size_t bytes);
  // nullptr where the request is not for the pool (too small, no room).
  void* allocate(size_t bytes);
  bool owns(const void* block) const {
    const auto offset = reinterpret_cast<uintptr_t>(block) - begin_;
    return offset < size_;
  }
  void free(void* block);
  // Bytes that may be used at `block`.
  size_t capacity(const void* block) const;
  // Gives the pages of every free block back; the bytes that they held.
  size_t release();
  Counts counts();
  // fork(2) copies the lock as it is: taken before, given back after on both sides.
  std::mutex& lock() { return lock_; }
  // In the child: those who were waiting did not come along, and must not be waited for.
  void forget_waiters() { new (&freed_) std::condition_variable; }

 private:
  static constexpr int classes = 8 * 40;
  struct Free {
    uint32_t page;
    uint64_t since;
  };
  // Free blocks, the last freed last; the first `bare` of them have lost their pages. `live`: blocks in use.
  struct Class {
    std::vector<Free> free;
    size_t bare = 0, live = 0;
    bool has_kept() const { return free.size() > bare; }
  };

  static int class_of(size_t bytes);
  static size_t bytes_of(int number);
  static int last_near(int number);
  void await_free(int number, std::unique_lock<std::mutex>& held);
  void* take(int number);
  void* extend(int number);
  void note_live();
  void shrink_to_bound();
  void drop_pages(int number);

  uintptr_t begin_ = 0;
  size_t size_ = 0, used_ = 0, opened_ = 0;
  uint16_t* class_of_page_ = nullptr;
  std::mutex lock_;
  std::condition_variable freed_;
  Class classes_[classes];
  size_t live_ = 0, kept_ = 0, reused_ = 0, fresh_ = 0;
  // The most live bytes of this span of time and of the one before it.
  size_t peak_ = 0, peak_before_ = 0;
  int64_t span_began_ = 0;
  uint64_t tick_ = 0;
};

}  // namespace jaxext
