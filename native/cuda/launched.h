// What every handler of a CUDA kernel needs beside its operands.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "ffi.h"

// A CUDA graph may keep the call: it only starts kernels, on memory that XLA owns.
#define JAXEXT_GRAPH {xla::ffi::Traits::kCmdBufferCompatible}

namespace jaxext::cuda {

// What a kernel's start returned, as the handler's result.
inline ffi::Error launched(const char* op, int error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  const char* text = cudaGetErrorString(static_cast<cudaError_t>(error));
  return ffi::Error::Internal(std::string("jaxext ") + op + ": a CUDA kernel was not started: " + text);
}

}  // namespace jaxext::cuda
