// First-order linear recurrences h[t] = a[t] h[t-1] + b[t]: arguments shared by the kernels and their handlers.
#pragma once
#include "isa.h"

namespace jaxext {

// All arrays are [outer, steps, inner], of one type.
struct LinearRecurrenceArgs {
  const void *a, *b;
  void* h;
  int64_t outer, steps, inner;
  bool bf16;  // else f32
};

struct LinearRecurrenceBackwardArgs {
  const void *a, *h, *grad;  // the result, and its cotangent
  void *da, *db;             // null where not wanted
  int64_t outer, steps, inner;
  bool bf16;
};

}  // namespace jaxext
