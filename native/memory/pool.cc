#include "memory/pool.h"

#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <bit>
#include <chrono>

namespace jaxext {
namespace {

constexpr size_t page = 4096, huge = size_t{2} << 20, opening = size_t{64} << 20, worth_waiting = opening;
constexpr int smallest_exponent = 16, span_seconds = 10;
static_assert(size_t{1} << smallest_exponent == BlockPool::smallest);

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

int64_t coarse_seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return now.tv_sec;
}

}  // namespace

int BlockPool::class_of(size_t bytes) {
  const size_t b = std::max(bytes, smallest) - 1;
  const int exponent = std::bit_width(b) - 1;
  return 8 * (exponent - smallest_exponent) + static_cast<int>(b >> (exponent - 3)) - 8 + 1;
}

size_t BlockPool::bytes_of(int number) {
  const int exponent = number / 8 + smallest_exponent;
  return static_cast<size_t>(8 + number % 8) << (exponent - 3);
}

bool BlockPool::reserve(size_t bytes) {
  void* range = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) return false;
  void* table = mmap(nullptr, bytes / page * sizeof(uint16_t), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (table == MAP_FAILED) {
    munmap(range, bytes);
    return false;
  }
  class_of_page_ = static_cast<uint16_t*>(table);
  begin_ = reinterpret_cast<uintptr_t>(range);
  size_ = bytes;
  used_ = round_up(begin_, huge) - begin_;
  opened_ = used_;
  return true;
}

void* BlockPool::allocate(size_t bytes) {
  if (bytes < smallest || bytes > size_ / 2) return nullptr;
  const int number = class_of(bytes);
  std::unique_lock held(lock_);
  if (bytes >= worth_waiting) await_free(number, held);
  void* block = take(number);
  if (block == nullptr) block = extend(number);
  if (block == nullptr) return nullptr;
  note_live();
  shrink_to_bound();
  return block;
}

// Requests of a class are answered from it and the next two.
int BlockPool::last_near(int number) { return std::min(number + 2, classes - 1); }

// Until a block is kept that answers the class, while one is in use; no longer than a twentieth of what it takes to write
// as many fresh pages at 10 GB/s.
void BlockPool::await_free(int number, std::unique_lock<std::mutex>& held) {
  const Class *first = classes_ + number, *end = classes_ + last_near(number) + 1;
  const auto any_kept = [&] { return std::any_of(first, end, [](const Class& c) { return c.has_kept(); }); };
  if (any_kept() || std::none_of(first, end, [](const Class& c) { return c.live > 0; })) return;
  freed_.wait_for(held, std::chrono::nanoseconds(bytes_of(number) / 200), any_kept);
}

// A kept block that answers the class, else one of the class that lost its pages.
void* BlockPool::take(int number) {
  for (int near = number; near <= last_near(number); ++near) {
    Class& c = classes_[near];
    if (!c.has_kept()) continue;
    const Free last = c.free.back();
    c.free.pop_back();
    ++c.live;
    kept_ -= bytes_of(near);
    live_ += bytes_of(near);
    ++reused_;
    return reinterpret_cast<void*>(begin_ + page * last.page);
  }
  Class& c = classes_[number];
  if (c.free.empty()) return nullptr;
  const Free last = c.free.back();
  c.free.pop_back();
  --c.bare;
  ++c.live;
  live_ += bytes_of(number);
  ++fresh_;
  return reinterpret_cast<void*>(begin_ + page * last.page);
}

void* BlockPool::extend(int number) {
  const size_t bytes = bytes_of(number);
  if (used_ + bytes > size_) return nullptr;
  if (used_ + bytes > opened_) {
    const size_t more = std::min(round_up(used_ + bytes - opened_, opening), size_ - opened_);
    void* from = reinterpret_cast<void*>(begin_ + opened_);
    if (mprotect(from, more, PROT_READ | PROT_WRITE) != 0) return nullptr;
    madvise(from, more, MADV_HUGEPAGE);
    opened_ += more;
  }
  class_of_page_[used_ / page] = static_cast<uint16_t>(number);
  void* block = reinterpret_cast<void*>(begin_ + used_);
  used_ += bytes;
  ++classes_[number].live;
  live_ += bytes;
  ++fresh_;
  return block;
}

void BlockPool::free(void* block) {
  const size_t first = (reinterpret_cast<uintptr_t>(block) - begin_) / page;
  const int number = class_of_page_[first];
  const std::lock_guard held(lock_);
  classes_[number].free.push_back({static_cast<uint32_t>(first), ++tick_});
  --classes_[number].live;
  live_ -= bytes_of(number);
  kept_ += bytes_of(number);
  shrink_to_bound();
  if (bytes_of(number) >= worth_waiting) freed_.notify_all();
}

size_t BlockPool::capacity(const void* block) const {
  return bytes_of(class_of_page_[(reinterpret_cast<uintptr_t>(block) - begin_) / page]);
}

void BlockPool::note_live() {
  const int64_t now = coarse_seconds();
  if (now - span_began_ >= span_seconds) {
    peak_before_ = now - span_began_ >= 2 * span_seconds ? 0 : peak_;
    peak_ = 0;
    span_began_ = now;
  }
  peak_ = std::max(peak_, live_);
}

void BlockPool::shrink_to_bound() {
  const size_t most = std::max(peak_, peak_before_);
  while (kept_ > 0 && live_ + kept_ > most + most / 4 + opening) {
    int oldest = -1;
    for (int number = 0; number < classes; ++number) {
      const Class& c = classes_[number];
      if (!c.has_kept()) continue;
      if (oldest < 0 || c.free[c.bare].since < classes_[oldest].free[classes_[oldest].bare].since) oldest = number;
    }
    drop_pages(oldest);
  }
}

void BlockPool::drop_pages(int number) {
  Class& c = classes_[number];
  madvise(reinterpret_cast<void*>(begin_ + page * c.free[c.bare].page), bytes_of(number), MADV_DONTNEED);
  ++c.bare;
  kept_ -= bytes_of(number);
}

size_t BlockPool::release() {
  const std::lock_guard held(lock_);
  const size_t before = kept_;
  for (int number = 0; number < classes; ++number)
    while (classes_[number].has_kept()) drop_pages(number);
  return before;
}

BlockPool::Counts BlockPool::counts() {
  const std::lock_guard held(lock_);
  return {live_, kept_, reused_, fresh_};
}

}  // namespace jaxext
