// The place of the largest or smallest element along one axis.
#pragma once
#include "isa.h"

namespace jaxext {

enum class ArgType : int { f32, bf16, f16, i8, i16, i32, u8, u16, u32 };

struct ArgReduceArgs {
  const void* x;     // [outer, n, inner]
  int32_t* indices;  // [outer, inner]
  int64_t outer, n, inner;
  ArgType type;
  bool largest;
};

}  // namespace jaxext
