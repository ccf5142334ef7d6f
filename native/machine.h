// The machine: instruction sets compiled and chosen, and the allocator's memory reuse.
#pragma once
#include <string>
#include <vector>

#include "isa.h"

namespace jaxext {

struct IsaChoice {
  std::string active;   // "" when nothing compiled runs here
  std::string problem;  // why `active` is empty, or what is wrong with the request
};

std::vector<std::string> compiled_isas();
std::vector<std::string> cpu_features();
const IsaChoice& isa_choice();

// Tells glibc to keep and reuse large freed buffers; "" on success, else why it could not.
std::string memory_reuse();
// Gives memory that is free inside the allocator back to the system; true when some was.
bool memory_release();

}  // namespace jaxext
