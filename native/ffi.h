// What every handler needs: bindings, argument checks and errors that name op, argument and expectation.
#pragma once
#include <string>

#include "element.h"
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

inline bool same_shape(ffi::Span<const int64_t> a, ffi::Span<const int64_t> b) {
  bool same = a.size() == b.size();
  for (size_t d = 0; same && d < a.size(); d++) same = a[d] == b[d];
  return same;
}

// Whether `type` is one of Element, and which.
inline bool element_of(ffi::DataType type, Element& found) {
  switch (type) {
    case ffi::DataType::F32: found = Element::f32; return true;
    case ffi::DataType::BF16: found = Element::bf16; return true;
    case ffi::DataType::F16: found = Element::f16; return true;
    case ffi::DataType::S8: found = Element::i8; return true;
    case ffi::DataType::S16: found = Element::i16; return true;
    case ffi::DataType::S32: found = Element::i32; return true;
    case ffi::DataType::U8: found = Element::u8; return true;
    case ffi::DataType::U16: found = Element::u16; return true;
    case ffi::DataType::U32: found = Element::u32; return true;
    default: return false;
  }
}

inline bool is_float(ffi::DataType t) { return t == ffi::DataType::F32 || t == ffi::DataType::BF16; }

}  // namespace jaxext
