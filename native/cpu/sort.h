// A stable sort of rows by one key; other arrays follow their key.
#pragma once
#include "element.h"
#include "isa.h"

namespace jaxext {

// An array that is put in the keys' order.
struct SortFollower {
  const void* x;  // [rows, n]
  void* out;      // likewise
  int bytes;      // of an element: 1, 2, 4 or 8
};

constexpr int kMostFollowers = 8;

struct SortArgs {
  const void* keys;  // [rows, n]
  void* sorted;      // likewise
  int64_t rows, n;
  Element type;
  int n_followers;
  SortFollower followers[kMostFollowers];
};

}  // namespace jaxext
