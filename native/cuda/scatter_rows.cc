// The FFI handler of rows added to by number on CUDA.
#include "cuda/scatter_rows.h"

#include "cuda/launched.h"

namespace jaxext::cuda {
namespace {

using Any = ffi::AnyBuffer;

ffi::Error run(cudaStream_t stream, Any table, Any numbers, Any order, Any updates, ffi::Result<Any> out,
               ffi::Result<Any> scratch) {
  const char* op = "scatter_rows";
  const auto dims = updates.dimensions(), held = table.dimensions();
  if (dims.size() != 2 || updates.element_type() != ffi::DataType::BF16)
    return bad_argument(op, "updates", "bf16 of shape [updates, width]");
  if (held.size() != 2 || held[1] != dims[1] || table.element_type() != ffi::DataType::BF16)
    return bad_argument(op, "table", "bf16 of shape [rows, width]");
  for (const Any* one : {&numbers, &order})
    if (one->element_count() != static_cast<size_t>(dims[0]) || one->element_type() != ffi::DataType::S32)
      return bad_argument(op, one == &numbers ? "numbers" : "order", "one int32 an update");
  const int64_t chunks = (dims[0] + kScatterChunk - 1) / kScatterChunk;
  if (scratch->element_type() != ffi::DataType::F32 ||
      static_cast<int64_t>(scratch->element_count()) < 2 * chunks * dims[1])
    return bad_argument(op, "scratch", "f32 of [chunks, 2, width]");
  if (out->untyped_data() != table.untyped_data()) return bad_argument(op, "table", "the array that is written over");
  if (dims[0] == 0 || dims[1] == 0) return ffi::Error::Success();
  const ScatterRowsArgs a{out->untyped_data(),
                          static_cast<const int32_t*>(numbers.untyped_data()),
                          static_cast<const int32_t*>(order.untyped_data()),
                          updates.untyped_data(),
                          static_cast<float*>(scratch->untyped_data()),
                          held[0],
                          dims[1],
                          dims[0]};
  return launched(op, scatter_rows(a, stream));
}

auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Arg<Any>()
      .Arg<Any>()
      .Arg<Any>()
      .Arg<Any>()
      .Ret<Any>()
      .Ret<Any>();
}

}  // namespace
}  // namespace jaxext::cuda

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_cuda_scatter_rows, jaxext::cuda::run, jaxext::cuda::binding(), JAXEXT_GRAPH);
