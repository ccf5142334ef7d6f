// Normalisation: a call's operands and results, checked and put in the order of the kernels' arguments.
#pragma once
#include "cpu/norm.h"
#include "ffi.h"

namespace jaxext {

// Takes operands (or results) in order, checks each and keeps the first complaint.
struct NormReader {
  const char* op;
  ffi::Span<const int64_t> shape;  // of x
  ffi::Error error = ffi::Error::Success();

  template <class Buffer>
  NormBuffer read(const Buffer& buffer, const char* name, bool rowwise) {
    const auto dims = buffer.dimensions();
    const size_t rank = shape.size(), least = rowwise ? 0 : rank - 1;
    bool same = dims.size() == rank - least && is_float(buffer.element_type());
    for (size_t d = least; same && d < rank; d++) same = dims[d - least] == shape[d];
    if (!same && error.success())
      error = bad_argument(op, name,
                           "f32 or bf16 of shape " + shape_text(shape) + (rowwise ? "" : "'s last dimension"));
    return {buffer.untyped_data(), buffer.element_type() == ffi::DataType::BF16};
  }

  // f32 values, one for each element of an array of shape `expected`.
  template <class Buffer>
  float* statistic(const Buffer& buffer, const char* name, ffi::Span<const int64_t> expected) {
    const bool same = same_shape(buffer.dimensions(), expected) && buffer.element_type() == ffi::DataType::F32;
    if (!same && error.success()) error = bad_argument(op, name, "f32 of shape " + shape_text(expected));
    return static_cast<float*>(buffer.untyped_data());
  }

  // One for each row of x.
  template <class Buffer>
  float* statistic(const Buffer& buffer, const char* name) {
    return statistic(buffer, name, {shape.begin(), shape.size() - 1});
  }
};

// Operands: x, [residual], [scale], [bias]. Results: out, [sum], [mean], rstd.
template <bool kCentred>
ffi::Error read_norm_forward(ffi::RemainingArgs& args, ffi::RemainingRets& rets, bool has_residual, bool has_scale,
                             bool has_bias, NormForwardArgs& a) {
  const char* op = kCentred ? "layer_norm" : "rms_norm";
  const size_t n_args = 1 + has_residual + has_scale + has_bias, n_rets = 2 + has_residual + kCentred;
  if (args.size() != n_args || rets.size() != n_rets) return bad_argument(op, "x", "followed by what the flags name");
  const auto first = args.get<ffi::AnyBuffer>(0);
  if (!first.has_value() || first->dimensions().size() < 1) return bad_argument(op, "x", "an array of rank 1 or more");
  NormReader reader{op, first->dimensions()};
  size_t arg = 0, ret = 0;
  auto in = [&](const char* name, bool rowwise) {
    return reader.read(*args.get<ffi::AnyBuffer>(arg++), name, rowwise);
  };
  auto out = [&](const char* name) { return reader.read(**rets.get<ffi::AnyBuffer>(ret++), name, true); };
  a.x = in("x", true);
  if (has_residual) a.residual = in("residual", true);
  if (has_scale) a.scale = in("scale", false);
  if (has_bias) a.bias = in("bias", false);
  a.out = out("out");
  if (has_residual) a.sum = out("sum");
  if (kCentred) a.mean = reader.statistic(**rets.get<ffi::AnyBuffer>(ret++), "mean");
  a.rstd = reader.statistic(**rets.get<ffi::AnyBuffer>(ret++), "rstd");
  if (reader.error.failure()) return reader.error;
  if (has_residual && (a.residual.bf16 != a.x.bf16 || a.sum.bf16 != a.x.bf16))
    return bad_argument(op, "residual", "of x's type");
  const auto dims = first->dimensions();
  a.features = dims[dims.size() - 1];
  a.rows = product(dims, 0, dims.size() - 1);
  return ffi::Error::Success();
}

// Operands: x, [scale], [bias], [mean], rstd, grad, [grad_sum]. Results: [dx], [dscale], [dbias], and `n_more` others.
template <bool kCentred>
ffi::Error read_norm_backward(ffi::RemainingArgs& args, ffi::RemainingRets& rets, bool has_scale, bool has_bias,
                              bool has_grad_sum, bool wants_dx, bool wants_dscale, bool wants_dbias, size_t n_more,
                              NormBackwardArgs& a) {
  const char* op = kCentred ? "layer_norm_backward" : "rms_norm_backward";
  const size_t n_args = 3 + has_scale + has_bias + kCentred + has_grad_sum;
  const size_t n_rets = static_cast<size_t>(wants_dx) + wants_dscale + wants_dbias + n_more;
  if (args.size() != n_args || rets.size() != n_rets) return bad_argument(op, "x", "followed by what the flags name");
  const auto first = args.get<ffi::AnyBuffer>(0);
  if (!first.has_value() || first->dimensions().size() < 1) return bad_argument(op, "x", "an array of rank 1 or more");
  NormReader reader{op, first->dimensions()};
  size_t arg = 0, ret = 0;
  auto in = [&](const char* name, bool rowwise) {
    return reader.read(*args.get<ffi::AnyBuffer>(arg++), name, rowwise);
  };
  auto out = [&](const char* name, bool rowwise) {
    return reader.read(**rets.get<ffi::AnyBuffer>(ret++), name, rowwise);
  };
  auto statistic = [&](const char* name) { return reader.statistic(*args.get<ffi::AnyBuffer>(arg++), name); };
  a.x = in("x", true);
  if (has_scale) a.scale = in("scale", false);
  if (has_bias) in("bias", false);
  if (kCentred) a.mean = statistic("mean");
  a.rstd = statistic("rstd");
  a.grad = in("grad", true);
  if (has_grad_sum) a.grad_sum = in("grad_sum", true);
  if (wants_dx) a.dx = out("dx", true);
  if (wants_dscale) a.dscale = out("dscale", false);
  if (wants_dbias) a.dbias = out("dbias", false);
  if (reader.error.failure()) return reader.error;
  if ((wants_dx && a.dx.bf16 != a.x.bf16) || (has_grad_sum && a.grad_sum.bf16 != a.x.bf16))
    return bad_argument(op, "grad_sum", "of x's type, as dx is");
  const auto dims = first->dimensions();
  a.features = dims[dims.size() - 1];
  a.rows = product(dims, 0, dims.size() - 1);
  return ffi::Error::Success();
}

}  // namespace jaxext
