// The FFI handlers of the softmax cross-entropy on CUDA. They only start kernels on XLA's stream, so a CUDA graph can
// keep them.
#include "cuda/cross_entropy.h"

#include "cuda/launched.h"
#include "logit_operands.h"

namespace jaxext::cuda {
namespace {

using Any = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

ffi::Error run(ffi::Error error, const CrossEntropyArgs& a, cudaStream_t stream) {
  if (error.failure() || a.rows == 0 || a.classes == 0) return error;
  if (a.rows >= int64_t{1} << 31) return bad_argument("softmax_cross_entropy", "logits", "of fewer than 2^31 rows");
  return launched("softmax_cross_entropy", cross_entropy(a, stream));
}

ffi::Error forward(cudaStream_t stream, float smoothing, bool one_hot, Any logits, Any labels, Result loss,
                   Result normalizer) {
  CrossEntropyArgs a{};
  return run(read_forward(logits, labels, loss, normalizer, smoothing, one_hot, a), a, stream);
}

ffi::Error backward(cudaStream_t stream, float smoothing, bool one_hot, Any logits, Any labels, Any normalizer,
                    Any grad, Result dlogits) {
  CrossEntropyArgs a{};
  return run(read_backward(logits, labels, normalizer, grad, dlogits, smoothing, one_hot, a), a, stream);
}

ffi::Error both(cudaStream_t stream, float smoothing, bool one_hot, Any logits, Any labels, Any grad, Result loss,
                Result normalizer, Result dlogits) {
  CrossEntropyArgs a{};
  LogitReader reader = read_logits("softmax_cross_entropy_with_gradient", logits, labels, smoothing, one_hot, a);
  a.grad = reader.read(grad, "grad", false);
  a.loss = reader.read(*loss, "loss", false);
  a.normalizer = reader.pairs(*normalizer);
  a.dlogits = reader.read(*dlogits, "dlogits", true);
  return run(reader.error, a, stream);
}

auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Attr<float>("label_smoothing")
      .Attr<bool>("one_hot")
      .Arg<Any>()
      .Arg<Any>();
}

auto forward_binding() { return binding().Ret<Any>().Ret<Any>(); }
auto backward_binding() { return binding().Arg<Any>().Arg<Any>().Ret<Any>(); }
auto both_binding() { return binding().Arg<Any>().Ret<Any>().Ret<Any>().Ret<Any>(); }

}  // namespace
}  // namespace jaxext::cuda

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_cuda_cross_entropy, jaxext::cuda::forward, jaxext::cuda::forward_binding(),
                              JAXEXT_GRAPH);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_cuda_cross_entropy_backward, jaxext::cuda::backward,
                              jaxext::cuda::backward_binding(), JAXEXT_GRAPH);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_cuda_cross_entropy_with_gradient, jaxext::cuda::both,
                              jaxext::cuda::both_binding(), JAXEXT_GRAPH);
