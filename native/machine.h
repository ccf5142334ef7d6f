// The machine: instruction sets compiled and chosen.
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

}  // namespace jaxext
