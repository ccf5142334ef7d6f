// The place of the largest or smallest element along one axis.
#pragma once
#include "element.h"
#include "isa.h"

namespace jaxext {

struct ArgReduceArgs {
  const void* x;     // [outer, n, inner]
  int32_t* indices;  // [outer, inner]
  int64_t outer, n, inner;
  Element type;
  bool largest;
};

}  // namespace jaxext
