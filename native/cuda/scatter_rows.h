// Rows added to by number on a CUDA stream.
#pragma once
#include <cstdint>

struct CUstream_st;

namespace jaxext::cuda {

constexpr int64_t kScatterChunk = 32;  // sorted updates that a block adds

struct ScatterRowsArgs {
  void* table;             // [rows, width] bf16, added to in place
  const int32_t* numbers;  // [updates]: the rows, in ascending order; those outside the table are dropped
  const int32_t* order;    // [updates]: where each row's update stands
  const void* updates;     // [updates, width] bf16
  float* scratch;          // [ceil(updates / kScatterChunk), 2, width]
  int64_t rows, width, count;
};

// Each row is read, added to in float32 in the order of its updates, and rounded once. Returns cudaSuccess (0), or why
// a launch failed.
int scatter_rows(const ScatterRowsArgs& a, CUstream_st* stream);

}  // namespace jaxext::cuda
