// Element types that have an order, for kernels that compare: floats and integers of at most 32 bits.
#pragma once

namespace jaxext {

enum class Element : int { f32, bf16, f16, i8, i16, i32, u8, u16, u32 };

}  // namespace jaxext
