"""The element types of kernels that compare, as native/element.h lists them."""

ORDERED = ("float32", "bfloat16", "float16", "int8", "int16", "int32", "uint8", "uint16", "uint32")
