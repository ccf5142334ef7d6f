// Random bits of JAX's default generator, Threefry 2x32 counting through a 64-bit index.
#pragma once
#include "isa.h"

namespace jaxext {

struct RandomBitsArgs {
  const uint32_t* keys;  // [rows, 2]
  void* out;             // [rows, n]
  int64_t rows, n;
  int bytes;  // of an output element: 1, 2 or 4
};

}  // namespace jaxext
