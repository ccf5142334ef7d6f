// Softmax cross-entropy: a call's operands and results, checked.
#pragma once
#include "cpu/cross_entropy.h"
#include "ffi.h"

namespace jaxext {

// Checks buffers against the logits' shape and keeps the first complaint.
struct LogitReader {
  const char* op;
  ffi::Span<const int64_t> shape;
  ffi::Error error = ffi::Error::Success();

  LogitReader(const char* op, const ffi::AnyBuffer& logits) : op(op), shape(logits.dimensions()) {
    if (shape.size() < 1) error = bad_argument(op, "logits", "an array of rank 1 or more");
  }

  bool fits(const ffi::AnyBuffer& buffer, bool per_class) const {
    const auto dims = buffer.dimensions();
    bool same = dims.size() == shape.size() - (per_class ? 0 : 1);
    for (size_t d = 0; same && d < dims.size(); d++) same = dims[d] == shape[d];
    return same;
  }

  LogitBuffer read(const ffi::AnyBuffer& buffer, const char* name, bool per_class) {
    if (error.success() && !(fits(buffer, per_class) && is_float(buffer.element_type())))
      error = bad_argument(op, name, "f32 or bf16 of shape " + shape_text(shape) +
                                         (per_class ? std::string() : std::string(" without its last dimension")));
    return {buffer.untyped_data(), buffer.element_type() == ffi::DataType::BF16};
  }

  template <class T>
  T* row(const ffi::AnyBuffer& buffer, const char* name, ffi::DataType type) {
    if (error.success() && !(fits(buffer, false) && buffer.element_type() == type))
      error = bad_argument(op, name, "f32 (labels: int32) of the logits' shape without its last dimension");
    return static_cast<T*>(buffer.untyped_data());
  }

  template <class Buffer>
  float* pairs(const Buffer& buffer) {
    const auto dims = buffer.dimensions();
    bool fit = dims.size() == shape.size() && buffer.element_type() == ffi::DataType::F32;
    for (size_t d = 0; fit && d < dims.size(); d++) fit = dims[d] == (d + 1 < dims.size() ? shape[d] : 2);
    if (error.success() && !fit)
      error = bad_argument(op, "normalizer", "f32 of the logits' shape with a last dimension of 2");
    return static_cast<float*>(buffer.untyped_data());
  }

  int64_t classes() const { return shape.size() ? shape[shape.size() - 1] : 0; }
  int64_t rows() const { return shape.size() ? product(shape, 0, shape.size() - 1) : 0; }
};

// What every call on labels has.
inline LogitReader read_logits(const char* op, const ffi::AnyBuffer& logits, const ffi::AnyBuffer& labels,
                               float smoothing, bool one_hot, CrossEntropyArgs& a) {
  LogitReader reader(op, logits);
  a.logits = reader.read(logits, "logits", true);
  a.labels = reader.row<const int32_t>(labels, "labels", ffi::DataType::S32);
  a.rows = reader.rows(), a.classes = reader.classes(), a.smoothing = smoothing, a.one_hot = one_hot;
  return reader;
}

inline ffi::Error read_forward(const ffi::AnyBuffer& logits, const ffi::AnyBuffer& labels,
                               ffi::Result<ffi::AnyBuffer>& loss, ffi::Result<ffi::AnyBuffer>& normalizer,
                               float smoothing, bool one_hot, CrossEntropyArgs& a) {
  LogitReader reader = read_logits("softmax_cross_entropy", logits, labels, smoothing, one_hot, a);
  a.loss = reader.read(*loss, "loss", false);
  a.normalizer = reader.pairs(*normalizer);
  return reader.error;
}

inline ffi::Error read_backward(const ffi::AnyBuffer& logits, const ffi::AnyBuffer& labels,
                                const ffi::AnyBuffer& normalizer, const ffi::AnyBuffer& grad,
                                ffi::Result<ffi::AnyBuffer>& dlogits, float smoothing, bool one_hot,
                                CrossEntropyArgs& a) {
  LogitReader reader = read_logits("softmax_cross_entropy_backward", logits, labels, smoothing, one_hot, a);
  a.normalizer = reader.pairs(normalizer);
  a.grad = reader.read(grad, "grad", false);
  a.dlogits = reader.read(*dlogits, "dlogits", true);
  if (reader.error.success() && a.dlogits.bf16 != a.logits.bf16)
    return bad_argument(reader.op, "dlogits", "of the logits' type");
  return reader.error;
}

}  // namespace jaxext
