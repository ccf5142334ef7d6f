// Where jaxlib's large buffers come from: its own calls of posix_memalign, free and realloc, led to a block pool.
#pragma once
#include <string>

#include "memory/pool.h"

namespace jaxext {

// From now on jaxlib takes its large buffers from the pool; "" or the reason why it does not.
std::string start_pool();
// jaxlib asks the system again; blocks that are in use stay valid.
void stop_pool();
// Gives the pages of the pool's free blocks back.
void release_pool();
// nullptr before the first start.
BlockPool* pool();

}  // namespace jaxext
