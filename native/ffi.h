// What every handler needs: bindings, argument checks and errors that name op, argument and expectation.
#pragma once
#include <string>

#include "isa.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jaxext {

namespace ffi = xla::ffi;

inline ffi::Error bad_argument(const char* op, const char* argument, const std::string& expected) {
  return ffi::Error::InvalidArgument(std::string("jaxext ") + op + ": argument '" + argument + "' must be " + expected);
}

inline std::string shape_text(ffi::Span<const int64_t> dims) {
  std::string s = "[";
  for (size_t i = 0; i < dims.size(); i++) {
    if (i) s += ',';
    s += std::to_string(dims[i]);
  }
  s += ']';
  return s;
}

// The product of dims[first, last).
inline int64_t product(ffi::Span<const int64_t> dims, size_t first, size_t last) {
  int64_t n = 1;
  for (size_t i = first; i < last; i++) n *= dims[i];
  return n;
}

inline bool is_float(ffi::DataType t) { return t == ffi::DataType::F32 || t == ffi::DataType::BF16; }

}  // namespace jaxext
