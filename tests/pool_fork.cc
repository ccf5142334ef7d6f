// A process forks while another of its threads waits in the pool for a block; the child then waits and frees there too.
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "memory/pool.h"

int main() {
  using jaxext::BlockPool;
  // Never written, so no memory is needed; a request of 2 GiB waits 10 ms for another that is in use.
  const size_t large = size_t{2} << 30;
  for (int round = 0; round < 5; ++round) {
    BlockPool& pool = *new BlockPool;
    if (!pool.reserve(size_t{1} << 36)) return 2;
    pool.allocate(large);
    void* blocks[3];
    for (size_t k = 0; k < 3; ++k) blocks[k] = pool.allocate((k + 1) * (size_t{100} << 20));
    std::thread waiting([&] { pool.allocate(large); });
    usleep(3000);
    pool.lock().lock();
    const pid_t child = fork();
    if (child == 0) pool.forget_waiters();
    pool.lock().unlock();
    if (child == 0) {
      pool.free(blocks[0]);
      std::thread waiting_here([&] { pool.allocate(large); });
      usleep(3000);
      pool.free(blocks[1]);
      pool.free(blocks[2]);
      waiting_here.join();
      _exit(0);
    }
    waiting.join();
    if (waitpid(child, nullptr, 0) != child) return 3;
  }
}
