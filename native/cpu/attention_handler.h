// The FFI handlers of attention: operands to arguments, with every shape and type checked.
//
// Operands: q, k, v, then those of `extras` ("bias", "mask", "query_segment_ids", "key_value_segment_ids", "keep"),
// then, backward, out, lse, low and the cotangent of out. Results: out, lse, low; backward, one gradient per index in
// `wrt`.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "attention.h"
#include "../ffi.h"

JAXEXT_DECLARE(attention_forward, AttentionArgs)
JAXEXT_DECLARE(attention_backward, AttentionArgs)

namespace jaxext {

// Attributes that both directions take.
struct AttentionAttributes {
  std::string_view extras;
  std::string_view layout;  // one letter for each of q, k, v, out: 't' [..., T, N, H], 'n' [..., N, T, H]
  float scale, soft_cap, keep_scale;
  int64_t band_low, band_high;
  int32_t fill;
};

class AttentionBinder {
 public:
  AttentionBinder(const char* op, const AttentionAttributes& attributes) : op_(op), attributes_(attributes) {}

  AttentionArgs args{};

  // q, k and v give every size; the rest is checked against them.
  ffi::Error bind_qkv(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v) {
    if (attributes_.layout.size() != 4) return bad_argument(op_, "layout", "four letters");
    auto d = q.dimensions();
    if (!is_float(q.element_type())) return bad_argument(op_, "query", "float32 or bfloat16");
    if (d.size() < 3 || d.size() > 3 + kMaxLeading) return bad_argument(op_, "query", "of rank 3 to 11");
    type_ = q.element_type();
    args.element = type_ == ffi::DataType::F32 ? AttentionElement::f32 : AttentionElement::bf16;
    args.leading_rank = static_cast<int64_t>(d.size()) - 3;
    args.batch = product(d, 0, args.leading_rank);
    for (int64_t i = 0; i < args.leading_rank; i++) args.leading[i] = d[i];
    bool heads_first = attributes_.layout[0] == 'n';
    args.heads = d[args.leading_rank + (heads_first ? 0 : 1)];
    args.queries = d[args.leading_rank + (heads_first ? 1 : 0)];
    args.depth = d[args.leading_rank + 2];
    if (k.dimensions().size() != d.size()) return bad_argument(op_, "key", "of query's rank");
    if (v.dimensions().size() != d.size()) return bad_argument(op_, "value", "of query's rank");
    bool keys_heads_first = attributes_.layout[1] == 'n';
    args.kv_heads = k.dimensions()[args.leading_rank + (keys_heads_first ? 0 : 1)];
    args.keys = k.dimensions()[args.leading_rank + (keys_heads_first ? 1 : 0)];
    args.value_depth = v.dimensions()[args.leading_rank + 2];
    if (args.depth < 1 || args.value_depth < 1) return bad_argument(op_, "query", "of head size at least 1");
    if (args.kv_heads ? args.heads % args.kv_heads : args.heads)
      return bad_argument(op_, "key", "of a number of heads that divides query's");
    bind_attributes();
    if (auto e = bind(q, "query", 0, args.heads, args.queries, args.depth, args.q); e.failure()) return e;
    if (auto e = bind(k, "key", 1, args.kv_heads, args.keys, args.depth, args.k); e.failure()) return e;
    return bind(v, "value", 2, args.kv_heads, args.keys, args.value_depth, args.v);
  }

  template <class Buffer>
  ffi::Error bind(Buffer x, const char* name, int which, int64_t heads, int64_t rows, int64_t depth,
                  AttentionOperand& to) {
    bool heads_first = attributes_.layout[which] == 'n';
    std::vector<int64_t> expected(args.leading, args.leading + args.leading_rank);
    expected.push_back(heads_first ? heads : rows);
    expected.push_back(heads_first ? rows : heads);
    expected.push_back(depth);
    auto d = x.dimensions();
    if (x.element_type() != type_ || std::vector<int64_t>(d.begin(), d.end()) != expected)
      return bad_argument(op_, name, "of query's dtype and shape " + text(expected) + ", not " + shape_text(d));
    to = {x.untyped_data(), heads * rows * depth, heads_first ? rows * depth : depth,
          heads_first ? depth : heads * depth};
    return ffi::Error::Success();
  }

  ffi::Error bind_bias_gradient(ffi::AnyBuffer x) {
    AttentionBroadcast checked{};
    if (x.element_type() != bias_type_) return bad_argument(op_, "bias's gradient", "of bias's dtype");
    if (auto e = broadcast(x, "bias's gradient", {args.heads, args.queries, args.keys}, checked); e.failure()) return e;
    if (args.batch * args.heads == 0) memset(x.untyped_data(), 0, x.size_bytes());
    args.bias_gradient = x.untyped_data();
    return ffi::Error::Success();
  }

  // [..., 0] where nothing is rounded away (f32).
  template <class Buffer>
  ffi::Error bind_low(Buffer x) {
    if (args.element == AttentionElement::f32) return ffi::Error::Success();
    return bind(x, "low", 3, args.heads, args.queries, args.value_depth, args.low);
  }

  template <class Buffer>
  ffi::Error bind_lse(Buffer x) {
    auto d = x.dimensions();
    if (x.element_type() != ffi::DataType::F32 || product(d, 0, d.size()) != 2 * args.batch * args.heads * args.queries)
      return bad_argument(op_, "lse", "float32 of shape [..., heads, 2, queries]");
    args.lse = static_cast<float*>(x.untyped_data());
    return ffi::Error::Success();
  }

  // The operands named in `extras`, from remaining operand 3 on; `next` is left behind them.
  ffi::Error bind_extras(ffi::RemainingArgs& operands, size_t& next) {
    std::string_view names = attributes_.extras;
    while (!names.empty()) {
      std::string name(names.substr(0, names.find(',')));
      names.remove_prefix(std::min(names.size(), name.size() + 1));
      auto x = operands.get<ffi::AnyBuffer>(next++);
      if (!x) return bad_argument(op_, name.c_str(), "present: `extras` names it");
      if (auto e = bind_extra(name, *x); e.failure()) return e;
    }
    return ffi::Error::Success();
  }

 private:
  void bind_attributes() {
    args.scale = attributes_.scale;
    args.soft_cap = attributes_.soft_cap;
    args.keep_scale = attributes_.keep_scale;
    // Beyond the array, so that no sum with an index overflows.
    args.band_low = std::clamp(attributes_.band_low, -args.queries, args.keys);
    args.band_high = std::clamp(attributes_.band_high, -args.queries - 1, args.keys);
    args.fill = static_cast<AttentionFill>(attributes_.fill);
  }

  ffi::Error bind_extra(const std::string& name, ffi::AnyBuffer x) {
    auto type = x.element_type();
    if (name == "bias") {
      if (!is_float(type)) return bad_argument(op_, "bias", "float32 or bfloat16");
      bias_type_ = type;
      args.bias.element = type == ffi::DataType::F32 ? AttentionElement::f32 : AttentionElement::bf16;
      return broadcast(x, "bias", {args.heads, args.queries, args.keys}, args.bias);
    }
    if (name == "mask" || name == "keep") {
      if (type != ffi::DataType::PRED) return bad_argument(op_, name.c_str(), "boolean");
      return broadcast(x, name.c_str(), {args.heads, args.queries, args.keys}, name == "mask" ? args.mask : args.keep);
    }
    if (type != ffi::DataType::S32) return bad_argument(op_, name.c_str(), "int32");
    if (name == "query_segment_ids") return broadcast(x, name.c_str(), {args.queries}, args.query_segments);
    if (name == "key_value_segment_ids") return broadcast(x, name.c_str(), {args.keys}, args.key_segments);
    return bad_argument(op_, "extras", "made of bias, mask, keep, query_segment_ids and key_value_segment_ids");
  }

  // Strides of x, whose dimensions are those of `leading` + `core` or 1; segment ids may not be broadcast along rows.
  ffi::Error broadcast(ffi::AnyBuffer x, const char* name, std::vector<int64_t> core, AttentionBroadcast& to) {
    std::vector<int64_t> full(args.leading, args.leading + args.leading_rank);
    full.insert(full.end(), core.begin(), core.end());
    auto d = x.dimensions();
    bool good = d.size() == full.size();
    for (size_t i = 0; good && i < full.size(); i++)
      good = d[i] == full[i] || (d[i] == 1 && (core.size() == 3 || i + 1 < full.size()));
    if (!good)
      return bad_argument(op_, name, "of shape " + text(full) + " (or 1 in a dimension), not " + shape_text(d));
    to.data = x.untyped_data();
    std::vector<int64_t> strides(full.size());
    int64_t stride = 1;
    for (size_t i = full.size(); i-- > 0; stride *= d[i]) strides[i] = d[i] == 1 ? 0 : stride;
    for (int64_t i = 0; i < args.leading_rank; i++) to.leading[i] = strides[i];
    if (core.size() == 3) {
      to.head = strides[args.leading_rank];
      to.query = strides[args.leading_rank + 1];
      to.key = strides[args.leading_rank + 2];
    }
    return ffi::Error::Success();
  }

  static std::string text(const std::vector<int64_t>& dims) {
    return shape_text(ffi::Span<const int64_t>(dims.data(), dims.size()));
  }

  const char* op_;
  const AttentionAttributes& attributes_;
  ffi::DataType type_ = ffi::DataType::INVALID, bias_type_ = ffi::DataType::INVALID;
};

inline ffi::Error attention_forward_call(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                                         ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out,
                                         ffi::Result<ffi::AnyBuffer> lse, ffi::Result<ffi::AnyBuffer> low,
                                         std::string_view extras, std::string_view layout, float scale, float soft_cap,
                                         float keep_scale, int64_t band_low, int64_t band_high, int32_t fill) {
  AttentionAttributes attributes{extras, layout, scale, soft_cap, keep_scale, band_low, band_high, fill};
  AttentionBinder binder("attention", attributes);
  AttentionArgs& a = binder.args;
  if (auto e = binder.bind_qkv(q, k, v); e.failure()) return e;
  size_t next = 0;
  if (auto e = binder.bind_extras(rest, next); e.failure()) return e;
  if (auto e = binder.bind(*out, "out", 3, a.heads, a.queries, a.value_depth, a.out); e.failure()) return e;
  if (auto e = binder.bind_lse(*lse); e.failure()) return e;
  if (auto e = binder.bind_low(*low); e.failure()) return e;
  if (a.batch * a.heads * a.queries > 0) JAXEXT_DISPATCH(attention_forward)(a, parallel(pool));
  return ffi::Error::Success();
}

inline ffi::Error bind_gradients(AttentionBinder& binder, ffi::RemainingRets& results, ffi::Span<const int64_t> wrt,
                                 std::string_view extras) {
  AttentionArgs& a = binder.args;
  for (size_t i = 0; i < wrt.size(); i++) {
    auto x = results.get<ffi::AnyBuffer>(i);
    if (!x) return bad_argument("attention_backward", "wrt", "as long as the results");
    ffi::AnyBuffer g = **x;
    ffi::Error e = ffi::Error::Success();
    if (wrt[i] == 0) e = binder.bind(g, "query's gradient", 0, a.heads, a.queries, a.depth, a.dq);
    else if (wrt[i] == 1) e = binder.bind(g, "key's gradient", 1, a.kv_heads, a.keys, a.depth, a.dk);
    else if (wrt[i] == 2) e = binder.bind(g, "value's gradient", 2, a.kv_heads, a.keys, a.value_depth, a.dv);
    else if (wrt[i] == 3 && extras.substr(0, 4) == "bias") e = binder.bind_bias_gradient(g);
    else e = bad_argument("attention_backward", "wrt", "indices of query, key, value and bias");
    if (e.failure()) return e;
  }
  return ffi::Error::Success();
}

inline ffi::Error attention_backward_call(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                                          ffi::RemainingArgs rest, ffi::RemainingRets results, std::string_view extras,
                                          std::string_view layout, float scale, float soft_cap, float keep_scale,
                                          int64_t band_low, int64_t band_high, int32_t fill,
                                          ffi::Span<const int64_t> wrt) {
  AttentionAttributes attributes{extras, layout, scale, soft_cap, keep_scale, band_low, band_high, fill};
  AttentionBinder binder("attention_backward", attributes);
  AttentionArgs& a = binder.args;
  if (auto e = binder.bind_qkv(q, k, v); e.failure()) return e;
  size_t next = 0;
  if (auto e = binder.bind_extras(rest, next); e.failure()) return e;
  auto out = rest.get<ffi::AnyBuffer>(next), lse = rest.get<ffi::AnyBuffer>(next + 1),
       low = rest.get<ffi::AnyBuffer>(next + 2), dout = rest.get<ffi::AnyBuffer>(next + 3);
  if (!out || !lse || !low || !dout) return bad_argument("attention_backward", "out, lse, low, cotangent", "present");
  if (auto e = binder.bind(*out, "out", 3, a.heads, a.queries, a.value_depth, a.out); e.failure()) return e;
  if (auto e = binder.bind(*dout, "cotangent", 3, a.heads, a.queries, a.value_depth, a.dout); e.failure()) return e;
  if (auto e = binder.bind_lse(*lse); e.failure()) return e;
  if (auto e = binder.bind_low(*low); e.failure()) return e;
  if (auto e = bind_gradients(binder, results, wrt, extras); e.failure()) return e;
  if (a.batch * a.kv_heads > 0) JAXEXT_DISPATCH(attention_backward)(a, parallel(pool));
  return ffi::Error::Success();
}

}  // namespace jaxext

#define JAXEXT_ATTENTION_ATTRIBUTES      \
  .Attr<std::string_view>("extras")      \
      .Attr<std::string_view>("layout")  \
      .Attr<float>("scale")              \
      .Attr<float>("soft_cap")           \
      .Attr<float>("keep_scale")         \
      .Attr<int64_t>("band_low")         \
      .Attr<int64_t>("band_high")        \
      .Attr<int32_t>("fill")

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_attention_forward, jaxext::attention_forward_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>() JAXEXT_ATTENTION_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxext_attention_backward, jaxext::attention_backward_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets() JAXEXT_ATTENTION_ATTRIBUTES
                                  .Attr<xla::ffi::Span<const int64_t>>("wrt"));
