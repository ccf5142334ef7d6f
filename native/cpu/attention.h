// Arguments of the attention kernels; shared by the FFI handlers and every instruction set's build.
#pragma once
#include <cstdint>

namespace jaxext {

constexpr int kMaxLeading = 8;

enum class AttentionElement : int { f32, bf16 };

// What a row whose keys are all masked gives: zeros, the mean of all values, or NaN.
enum class AttentionFill : int { zeros, uniform, nan };

// [batch, row, head, feature] of either layout; strides in elements, features contiguous.
struct AttentionOperand {
  void* data;
  int64_t batch, head, row;
};

// A [..., head, query, key] array whose dimensions are full or 1; stride 0 along the latter. No data: absent.
struct AttentionBroadcast {
  const void* data;
  AttentionElement element;  // of a bias; masks and keep are bytes, segment ids int32
  int64_t leading[kMaxLeading];
  int64_t head, query, key;
};

struct AttentionArgs {
  AttentionElement element;
  int64_t leading_rank, leading[kMaxLeading];
  int64_t batch, heads, kv_heads, queries, keys, depth, value_depth;
  float scale, soft_cap, keep_scale;  // soft_cap 0: none
  int64_t band_low, band_high;        // row i attends key j iff band_low <= j - i <= band_high
  AttentionFill fill;
  AttentionOperand q, k, v, out;
  AttentionOperand low;  // bf16 only: what rounding took from out, which backward's sum(out * dout) needs
  // [batch, heads, 2, queries]: a maximum of the row's scores (-inf where every key is masked) and the logarithm of its
  // sum relative to that, base 2. Apart, because beside a score of -1e9 their sum would lose the logarithm.
  float* lse;
  AttentionBroadcast bias, mask, keep, query_segments, key_segments;
  // Backward only. A null gradient is not computed; bias_gradient has bias's shape and element type.
  AttentionOperand dout, dq, dk, dv;
  void* bias_gradient;
};

}  // namespace jaxext
