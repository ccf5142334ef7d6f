// The largest elements of each row, with their places.
#pragma once
#include "isa.h"

namespace jaxext {

// How an element's bits become a signed integer of the same order.
enum class KeyKind : int { floating, signed_integer, unsigned_integer };

struct TopKArgs {
  const void* x;     // [rows, n]
  void* values;      // [rows, k]
  int32_t* indices;  // [rows, k]
  int64_t rows, n, k;
  int bytes;  // of an element: 1, 2 or 4
  KeyKind kind;
};

}  // namespace jaxext
