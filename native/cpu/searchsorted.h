// Binary search of many numbers in one sorted array.
#pragma once
#include "element.h"
#include "isa.h"

namespace jaxext {

struct SearchSortedArgs {
  const int32_t* sorted;  // [n], of `type`
  const int32_t* query;   // [count], likewise
  int32_t* place;         // [count]
  int64_t n, count;
  Element type;  // f32 or i32
  bool right;
};

}  // namespace jaxext
