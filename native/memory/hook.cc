// The method is that of tools that watch a library's allocations (memray, plthook): the slots of the library's global
// offset table through which it calls the C library are pointed elsewhere. Other libraries are not touched.
#include "memory/hook.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>

#if defined(__linux__) && defined(__GLIBC__)
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace jaxext {
namespace {

BlockPool* the_pool = nullptr;
std::atomic<bool> pooling{false};

int pool_memalign(void** result, size_t alignment, size_t bytes) {
  if (pooling.load(std::memory_order_relaxed) && bytes >= BlockPool::smallest &&
      alignment <= BlockPool::most_alignment) {
    if (void* block = the_pool->allocate(bytes)) {
      *result = block;
      return 0;
    }
  }
  return posix_memalign(result, alignment, bytes);
}

void* pool_malloc(size_t bytes) {
  if (pooling.load(std::memory_order_relaxed) && bytes >= BlockPool::smallest) {
    if (void* block = the_pool->allocate(bytes)) return block;
  }
  return malloc(bytes);
}

void pool_free(void* block) {
  if (the_pool->owns(block)) {
    the_pool->free(block);
  } else {
    free(block);
  }
}

void* pool_realloc(void* block, size_t bytes) {
  if (!the_pool->owns(block)) return realloc(block, bytes);
  const size_t had = the_pool->capacity(block);
  void* moved = malloc(bytes);
  if (moved == nullptr) return nullptr;
  memcpy(moved, block, bytes < had ? bytes : had);
  the_pool->free(block);
  return moved;
}

#if defined(__linux__) && defined(__GLIBC__)

#if defined(__x86_64__)
constexpr unsigned slot_types[] = {R_X86_64_JUMP_SLOT, R_X86_64_GLOB_DAT, R_X86_64_64};
#elif defined(__aarch64__)
constexpr unsigned slot_types[] = {R_AARCH64_JUMP_SLOT, R_AARCH64_GLOB_DAT, R_AARCH64_ABS64};
#else
constexpr unsigned slot_types[] = {0};
#endif

struct Replacement {
  const char* name;
  void* function;
  int slots;    // that were found
  int refused;  // of them, that could not be written
};

bool set_slot(uintptr_t slot, void* function) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  void* start = reinterpret_cast<void*>(slot / page * page);
  // The table may be read-only since the library was linked; what else lies on the page stays writable.
  if (mprotect(start, page, PROT_READ | PROT_WRITE) != 0) return false;
  __atomic_store_n(reinterpret_cast<void**>(slot), function, __ATOMIC_RELEASE);
  return true;
}

struct Table {
  const ElfW(Sym) * symbols = nullptr;
  const char* names = nullptr;
  const ElfW(Rela) * relocations[2] = {nullptr, nullptr};
  size_t bytes[2] = {0, 0};
};

Table table_of(const dl_phdr_info& library) {
  Table table;
  for (int k = 0; k < library.dlpi_phnum; ++k) {
    if (library.dlpi_phdr[k].p_type != PT_DYNAMIC) continue;
    const auto* entry = reinterpret_cast<const ElfW(Dyn)*>(library.dlpi_addr + library.dlpi_phdr[k].p_vaddr);
    for (; entry->d_tag != DT_NULL; ++entry) {
      const auto address = entry->d_un.d_ptr;
      if (entry->d_tag == DT_SYMTAB) table.symbols = reinterpret_cast<const ElfW(Sym)*>(address);
      if (entry->d_tag == DT_STRTAB) table.names = reinterpret_cast<const char*>(address);
      if (entry->d_tag == DT_JMPREL) table.relocations[0] = reinterpret_cast<const ElfW(Rela)*>(address);
      if (entry->d_tag == DT_PLTRELSZ) table.bytes[0] = entry->d_un.d_val;
      if (entry->d_tag == DT_RELA) table.relocations[1] = reinterpret_cast<const ElfW(Rela)*>(address);
      if (entry->d_tag == DT_RELASZ) table.bytes[1] = entry->d_un.d_val;
    }
  }
  return table;
}

bool is_slot(unsigned type) {
  for (const unsigned known : slot_types)
    if (type == known) return true;
  return false;
}

// Called for each loaded library until it returns other than 0.
int replace_in(dl_phdr_info* library, size_t, void* data) {
  if (strstr(library->dlpi_name, "libjax_common.so") == nullptr) return 0;
  auto* replacements = static_cast<Replacement*>(data);
  const Table table = table_of(*library);
  for (int which = 0; which < 2; ++which) {
    for (size_t k = 0; k < table.bytes[which] / sizeof(ElfW(Rela)); ++k) {
      const ElfW(Rela)& entry = table.relocations[which][k];
      const auto symbol = ELF64_R_SYM(entry.r_info);
      if (symbol == 0 || !is_slot(ELF64_R_TYPE(entry.r_info))) continue;
      const char* name = table.names + table.symbols[symbol].st_name;
      for (Replacement* r = replacements; r->name != nullptr; ++r)
        if (strcmp(r->name, name) == 0) {
          ++r->slots;
          r->refused += !set_slot(library->dlpi_addr + entry.r_offset, r->function);
        }
    }
  }
  return 1;
}

std::string lead_to_pool() {
  // free and realloc first: a block of the pool must never reach the C library's.
  Replacement freeing[] = {{"free", reinterpret_cast<void*>(pool_free), 0, 0},
                           {"realloc", reinterpret_cast<void*>(pool_realloc), 0, 0},
                           {nullptr, nullptr, 0, 0}};
  if (dl_iterate_phdr(replace_in, freeing) == 0) return "jaxlib's library libjax_common.so is not loaded";
  if (freeing[0].slots == 0) return "jaxlib does not call free of the C library";
  if (freeing[0].refused + freeing[1].refused > 0) return "jaxlib's table of calls cannot be written";
  Replacement taking[] = {{"posix_memalign", reinterpret_cast<void*>(pool_memalign), 0, 0},
                          {"malloc", reinterpret_cast<void*>(pool_malloc), 0, 0},
                          {nullptr, nullptr, 0, 0}};
  dl_iterate_phdr(replace_in, taking);
  if (taking[0].slots == 0) return "jaxlib does not call posix_memalign of the C library";
  return "";
}

#else
std::string lead_to_pool() { return "memory reuse needs Linux with glibc"; }
#endif

void before_fork() { the_pool->lock().lock(); }
void after_fork() { the_pool->lock().unlock(); }
void after_fork_in_child() {
  the_pool->forget_waiters();
  after_fork();
}

std::string prepare() {
  // Never destroyed: jaxlib's threads and its own destructors free blocks until the process is gone.
  static BlockPool& reserved = *new BlockPool;
  if (!reserved.reserve(size_t{1} << 40)) return std::string("the address range was refused: ") + strerror(errno);
  the_pool = &reserved;
  pthread_atfork(before_fork, after_fork, after_fork_in_child);
  return lead_to_pool();
}

}  // namespace

std::string start_pool() {
  static const std::string problem = prepare();
  pooling = problem.empty();
  return problem;
}

void stop_pool() {
  pooling = false;
  release_pool();
}

void release_pool() {
  if (the_pool != nullptr) the_pool->release();
}

BlockPool* pool() { return the_pool; }

}  // namespace jaxext
