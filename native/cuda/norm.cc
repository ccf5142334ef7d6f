// The FFI handlers of the norms on CUDA. They only start kernels on XLA's stream, so a CUDA graph can keep them.
#include "cuda/norm.h"

#include "cuda/launched.h"
#include "norm_operands.h"

namespace jaxext::cuda {
namespace {

// Both sums of a block's rows have to fit in the shared memory that every device gives unasked.
constexpr int64_t kMostFeatures = (48 * 1024 - 128) / (2 * sizeof(float));

template <bool kCentred>
ffi::Error forward(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets, float epsilon,
                   float scale_offset, bool has_residual, bool has_scale, bool has_bias) {
  NormForwardArgs a{};
  a.epsilon = epsilon;
  a.scale_offset = scale_offset;
  ffi::Error error = read_norm_forward<kCentred>(args, rets, has_residual, has_scale, has_bias, a);
  if (error.failure()) return error;
  if (a.rows == 0 || a.features == 0) return ffi::Error::Success();
  if (a.rows >= int64_t{1} << 31) return bad_argument("norm", "x", "of fewer than 2^31 rows");
  return launched("norm", kCentred ? layer_norm_forward(a, stream) : rms_norm_forward(a, stream));
}

// As on the CPU, with one more result: f32 scratch of [norm_chunks(rows), 2, features], or of no elements where neither
// dscale nor dbias is wanted. XLA owns it, so that a CUDA graph may run again.
template <bool kCentred>
ffi::Error backward(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets, float scale_offset,
                    bool has_scale, bool has_bias, bool has_grad_sum, bool wants_dx, bool wants_dscale,
                    bool wants_dbias) {
  NormBackwardArgs a{};
  a.scale_offset = scale_offset;
  ffi::Error error = read_norm_backward<kCentred>(args, rets, has_scale, has_bias, has_grad_sum, wants_dx,
                                                  wants_dscale, wants_dbias, 1, a);
  if (error.failure()) return error;
  auto scratch = rets.get<ffi::AnyBuffer>(rets.size() - 1);
  const int64_t needed = wants_dscale || wants_dbias ? norm_chunks(a.rows) * 2 * a.features : 0;
  if (!scratch.has_value() || (**scratch).element_type() != ffi::DataType::F32 ||
      static_cast<int64_t>((**scratch).element_count()) < needed)
    return bad_argument("norm backward", "partials", "f32 of [chunks, 2, features]");
  if (a.features == 0) return ffi::Error::Success();
  if (needed && a.features > kMostFeatures)
    return bad_argument("norm backward", "x", "of at most " + std::to_string(kMostFeatures) + " features");
  float* partials = static_cast<float*>((**scratch).untyped_data());
  return launched("norm", kCentred ? layer_norm_backward(a, partials, stream) : rms_norm_backward(a, partials, stream));
}

auto forward_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<float>("epsilon")
      .Attr<float>("scale_offset")
      .Attr<bool>("has_residual")
      .Attr<bool>("has_scale")
      .Attr<bool>("has_bias");
}

auto backward_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<float>("scale_offset")
      .Attr<bool>("has_scale")
      .Attr<bool>("has_bias")
      .Attr<bool>("has_grad_sum")
      .Attr<bool>("wants_dx")
      .Attr<bool>("wants_dscale")
      .Attr<bool>("wants_dbias");
}

}  // namespace
}  // namespace jaxext::cuda

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_cuda_layer_norm, jaxext::cuda::forward<true>, jaxext::cuda::forward_binding(),
                              JAXEXT_GRAPH);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_cuda_rms_norm, jaxext::cuda::forward<false>, jaxext::cuda::forward_binding(),
                              JAXEXT_GRAPH);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_cuda_layer_norm_backward, jaxext::cuda::backward<true>,
                              jaxext::cuda::backward_binding(), JAXEXT_GRAPH);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_cuda_rms_norm_backward, jaxext::cuda::backward<false>,
                              jaxext::cuda::backward_binding(), JAXEXT_GRAPH);
