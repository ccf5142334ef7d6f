// The gradient of an additive bias: score gradients summed over the dimensions along which the bias is broadcast.
//
// A pass of its own: one task owns a block of the gradient and adds up, in a fixed order, every (batch, head) that the
// block serves. That recomputes the scores, but needs neither locks nor a T x S array beside the gradient itself.
#pragma once
#include "attention_backward.h"

namespace jaxext::JAXEXT_ISA {
namespace {

template <class Mode>
struct BiasGradientTask {
  const AttentionArgs& a;
  const Rules& rules;
  int64_t offset;  // of the (batch, head) slice in the bias
  float *sums;     // [kQueries or 1][kKeys or 1] of the gradient
  float *queries, *douts, *key_panels, *value_panels, *scores, *dweights, *slope;
  RowSums row_sums;
  int64_t query_row, dout_row;

  static int64_t scratch(const AttentionArgs& a) {
    int64_t steps = words<Mode>(a.depth), value_steps = words<Mode>(a.value_depth);
    return kQueries * (Mode::kKeys + round_up(steps, kLanes) + round_up(value_steps, kLanes) + 3) +
           Mode::kKeys * (steps + value_steps + 3 * kRows) + 64;
  }

  BiasGradientTask(const AttentionArgs& args, const Rules& r, int64_t slice, float* memory)
      : a(args), rules(r), offset(slice), sums(memory) {
    query_row = round_up(words<Mode>(a.depth), kLanes);
    dout_row = round_up(words<Mode>(a.value_depth), kLanes);
    queries = sums + kQueries * Mode::kKeys;
    douts = queries + kQueries * query_row;
    key_panels = douts + kQueries * dout_row;
    value_panels = key_panels + Mode::kKeys * words<Mode>(a.depth);
    scores = value_panels + Mode::kKeys * words<Mode>(a.value_depth);
    dweights = scores + kRows * Mode::kKeys;
    slope = dweights + kRows * Mode::kKeys;
    float* maximum = slope + kRows * Mode::kKeys;
    row_sums = {maximum, maximum + kQueries, maximum + 2 * kQueries};
  }

  void add_strip(const HeadArrays& arrays, int64_t row, int64_t i, int64_t key) {
    Span band = band_span(a, row + i, kRows, key, Mode::kKeys);
    if (band.first >= band.last) return;
    int64_t first = round_down(band.first, kLanes), last = round_up(band.last, kLanes);
    panel_product<Mode>(scores, Mode::kKeys, {queries + i * query_row, query_row, 1}, key_panels,
                        words<Mode>(a.depth), first, last);
    panel_product<Mode>(dweights, Mode::kKeys, {douts + i * dout_row, dout_row, 1}, value_panels,
                        words<Mode>(a.value_depth), first, last);
    apply_rules(rules, arrays, row + i, key, first, last, scores, Mode::kKeys);
    Dropout drop{arrays.keep ? arrays.keep + (row + i) * a.keep.query + key * a.keep.key : nullptr,
                 a.keep.query, a.keep.key, a.keys - key, a.queries - row - i, a.keep_scale};
    score_gradients(scores, dweights, Mode::kKeys, first, last, 1.f,
                    {row_sums.maximum + i, row_sums.log_sum + i, row_sums.delta + i}, nullptr, drop);
    for (int64_t r = 0; r < least(kRows, a.queries - row - i); r++)
      for (int64_t c = first; c < last; c += kLanes) {
        float* p = sums + (a.bias.query ? i + r : 0) * Mode::kKeys + c;
        store(p, load(p) + load(dweights + r * Mode::kKeys + c));
      }
  }

  void add_block(const HeadArrays& arrays, int64_t b, int64_t h, int64_t row, int64_t key) {
    int64_t rows = least(a.queries - row, kQueries);
    Span band = band_span(a, row, rows, key, Mode::kKeys);
    if (band.first >= band.last) return;
    memset(queries, 0, kQueries * (query_row + dout_row) * sizeof(float));
    pack_rows<Mode>(row_of<Mode>(a.q, b, h, row), a.q.row, rows, a.depth, rules.query_scale, queries, query_row);
    pack_rows<Mode>(row_of<Mode>(a.dout, b, h, row), a.dout.row, rows, a.value_depth, 1.f, douts, dout_row);
    row_statistics<Mode>(a, b, h, row, row_sums);
    for (int64_t i = 0; i < rows; i += kRows) add_strip(arrays, row, i, key);
  }

  // Every (batch, head) of the slice, over queries [row, last_row) and the key block.
  void add_slice(int64_t row, int64_t last_row, int64_t key) {
    for (int64_t x = 0; x < a.batch * a.heads; x++) {
      int64_t b = x / a.heads, h = x % a.heads, g = h / (a.heads / a.kv_heads);
      if (head_offset(a, a.bias, b, h) != offset) continue;
      int64_t valid = least(a.keys - key, Mode::kKeys);
      pack_panels<Mode>(row_of<Mode>(a.k, b, g, key), a.k.row, valid, Mode::kKeys, a.depth, key_panels);
      pack_panels<Mode>(row_of<Mode>(a.v, b, g, key), a.v.row, valid, Mode::kKeys, a.value_depth, value_panels);
      HeadArrays arrays = head_arrays(a, b, h);
      for (int64_t i = row; i < last_row; i += kQueries) add_block(arrays, b, h, i, key);
    }
  }

  void write(int64_t row, int64_t rows, int64_t key, int64_t keys) {
    for (int64_t r = 0; r < (a.bias.query ? rows : 1); r++) {
      float* line = sums + r * Mode::kKeys;
      if (!a.bias.key) {
        vf total{};
        for (int64_t c = 0; c < Mode::kKeys; c += kLanes) total = total + load(line + c);
        line[0] = reduce_add(total);
      }
      int64_t n = a.bias.key ? keys : 1, at = offset + (row + r) * a.bias.query + key * a.bias.key;
      if (a.bias.element == AttentionElement::f32)
        memcpy(static_cast<float*>(a.bias_gradient) + at, line, n * sizeof(float));
      else
        for (int64_t c = 0; c < n; c += kLanes)
          store_part(static_cast<bf16*>(a.bias_gradient) + at + c, load(line + c), n - c);
    }
  }
};

// Whether (b, h) is the first of those that share a slice of the bias.
bool first_of_slice(const AttentionArgs& a, int64_t b, int64_t h) {
  if (!a.bias.head && h) return false;
  for (int64_t d = a.leading_rank - 1; d >= 0; d--) {
    if (!a.bias.leading[d] && b % a.leading[d]) return false;
    b /= a.leading[d];
  }
  return true;
}

template <class Mode>
void bias_gradient(const AttentionArgs& a, const Parallel& par) {
  Rules rules = make_rules<Mode>(a);
  int64_t query_blocks = a.bias.query ? (a.queries + kQueries - 1) / kQueries : 1;
  int64_t key_blocks = a.bias.key ? (a.keys + Mode::kKeys - 1) / Mode::kKeys : 1;
  parallel_for(par, a.batch * a.heads * query_blocks * key_blocks, [&](int64_t t) {
    int64_t pair = t / key_blocks / query_blocks, b = pair / a.heads, h = pair % a.heads;
    if (!first_of_slice(a, b, h)) return;
    auto memory = static_cast<float*>(thread_arena(BiasGradientTask<Mode>::scratch(a) * sizeof(float)));
    BiasGradientTask<Mode> task(a, rules, head_offset(a, a.bias, b, h), memory);
    memset(task.sums, 0, kQueries * Mode::kKeys * sizeof(float));
    int64_t row = t / key_blocks % query_blocks * kQueries, key = t % key_blocks * Mode::kKeys;
    int64_t last_row = a.bias.query ? least(row + kQueries, a.queries) : a.queries;
    int64_t last_key = a.bias.key ? least(key + Mode::kKeys, a.keys) : a.keys;
    for (int64_t j = key; j < last_key; j += Mode::kKeys) task.add_slice(row, last_row, j);
    task.write(row, last_row - row, key, last_key - key);
  });
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
