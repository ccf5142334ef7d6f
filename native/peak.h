#pragma once
#include <cstddef>
#include <cstdint>

namespace jaxext {

enum class PeakKind { f32, bf16, copy };

struct PeakArgs {
  PeakKind kind;
  int64_t rounds;       // f32, bf16
  void* destination;    // copy
  const void* source;
  size_t bytes;
  double* done;
};

// The peak over `threads` threads for about `seconds`: FLOP/s, or bytes read and written per second.
double measure_peak(PeakKind kind, int threads, double seconds);

}  // namespace jaxext
